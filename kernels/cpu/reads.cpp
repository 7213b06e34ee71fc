#include "reads.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <system_error>

#ifdef __linux__
#include <sys/prctl.h>
#endif

namespace streamer {
namespace {

constexpr size_t most_parts = 1024;  // of one preadv: IOV_MAX where it runs
char discarded[16 << 10];           // what lies between two pieces; nobody reads it

double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}

int64_t processor_time() {
  timespec spent;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &spent);
  return spent.tv_sec * int64_t(1'000'000'000) + spent.tv_nsec;
}

void sleep_until(double moment) {
  double left = moment - now();
  if (left > 0) std::this_thread::sleep_for(std::chrono::duration<double>(left));
}

// Neighbours become one read; overlapping pieces stay apart.
std::vector<ReadRun> merge(std::vector<ReadPiece>& pieces, size_t gap) {
  std::stable_sort(pieces.begin(), pieces.end(), [](const ReadPiece& a, const ReadPiece& b) {
    return std::pair(a.file, a.offset) < std::pair(b.file, b.offset);
  });
  std::vector<ReadRun> runs;
  for (const ReadPiece& p : pieces) {
    if (!p.nbytes) continue;
    int64_t between = -1;
    if (!runs.empty() && runs.back().file == p.file && runs.back().parts.size() + 2 <= most_parts) {
      between = p.offset - (runs.back().offset + static_cast<int64_t>(runs.back().nbytes));
    }
    if (between < 0 || between > static_cast<int64_t>(std::min(gap, sizeof discarded))) {
      runs.push_back({p.file, p.offset, 0, {}});
      between = 0;
    }
    ReadRun& run = runs.back();
    if (between) run.parts.push_back({discarded, static_cast<size_t>(between)});
    run.parts.push_back({p.at, p.nbytes});
    run.nbytes += p.nbytes + between;
  }
  return runs;
}

// Equal lengths of about `size`, cut between blocks of the file.
void cut(ReadRun run, size_t size, size_t block, std::vector<ReadRun>& out) {
  size_t count = (run.nbytes + size / 2) / size;
  if (count <= 1) return out.push_back(std::move(run));
  size_t step = (run.nbytes + count - 1) / count, part = 0, used = 0;
  int64_t at = run.offset, end = run.offset + static_cast<int64_t>(run.nbytes);
  while (at < end) {
    int64_t up = (at + static_cast<int64_t>(step + block - 1)) / block * block, stop = std::min(end, up);
    ReadRun piece{run.file, at, static_cast<size_t>(stop - at), {}};
    while (at < stop) {
      iovec& from = run.parts[part];
      size_t n = std::min(from.iov_len - used, static_cast<size_t>(stop - at));
      piece.parts.push_back({static_cast<char*>(from.iov_base) + used, n});
      at += n;
      used += n;
      if (used == from.iov_len) ++part, used = 0;
    }
    out.push_back(std::move(piece));
  }
}

// 0, errno, or reading_ended.
int fill(int fd, std::vector<iovec> parts, int64_t offset) {
  size_t first = 0;
  while (first < parts.size()) {
    ssize_t n = preadv(fd, parts.data() + first, static_cast<int>(parts.size() - first), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    if (n == 0) return reading_ended;
    offset += n;
    while (first < parts.size() && static_cast<size_t>(n) >= parts[first].iov_len) {
      n -= parts[first++].iov_len;
    }
    if (n) {
      parts[first].iov_base = static_cast<char*>(parts[first].iov_base) + n;
      parts[first].iov_len -= n;
    }
  }
  return reading_fine;
}

float wide(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff, bits;
  if (rest >= 0x7c00) {
    bits = sign | 0x7f800000 | (rest & 0x3ff) << 13;
  } else if (rest >= 0x400) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {
    float value = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

void widen(const Widening& w) {
  if (!w.brain) {
    for (size_t i = 0; i < w.count; ++i) w.to[i] = wide(w.from[i]);
    return;
  }
  auto* to = reinterpret_cast<uint32_t*>(w.to);
  for (size_t i = 0; i < w.count; ++i) to[i] = static_cast<uint32_t>(w.from[i]) << 16;
}

}  // namespace

Reads::Reads(std::vector<int> fds, ReadOptions options)
    : guess_bytes(options.guess_bytes), fds_(std::move(fds)), options_(options) {}

Reads::~Reads() { stop(); }

std::shared_ptr<ReadBatch> Reads::submit(
    std::vector<ReadPiece> pieces, std::vector<Widening> widenings, std::optional<double> guess) {
  auto batch = std::make_shared<ReadBatch>();
  std::vector<ReadRun> runs = merge(pieces, options_.gap);
  size_t total = 0;
  for (const ReadRun& run : runs) total += run.nbytes;
  size_t size = std::clamp(total / options_.threads, options_.chunk_min, options_.chunk_max);
  if (guess) size = options_.chunk_min;
  for (ReadRun& run : runs) cut(std::move(run), size, options_.block, batch->runs);
  batch->widenings = std::move(widenings);
  batch->left = static_cast<int>(batch->runs.size());
  batch->guess = guess.has_value();
  batch->deadline = guess.value_or(0);
  batch->asked = now();
  std::lock_guard hold(lock_);
  if (stopped_) {
    batch->state = reading_closed;
    batch->left = 0;
    return batch;
  }
  if (batch->runs.empty()) return batch;
  start();
  batch->number = numbers_++;
  batch->queued = true;
  if (guess) {
    guesses_[{batch->deadline, batch->number}] = batch;
  } else {
    demands_.push_back(batch);
  }
  batch->runs.size() > 1 ? work_.notify_all() : work_.notify_one();
  return batch;
}

// As many threads as this process may have, one at least.
void Reads::start() {
  try {
    while (!all_ && static_cast<int>(threads_.size()) < options_.threads) {
      threads_.emplace_back([this, log = &logs_.emplace_back()] { work(*log); });
    }
  } catch (const std::system_error&) {
    if (threads_.empty()) throw;
  }
  all_ = true;
}

bool Reads::wait(ReadBatch& batch, double seconds) {
  auto there = [&] { return batch.left.load(std::memory_order_acquire) == 0; };
  if (there()) return true;
  std::unique_lock hold(lock_);
  return landed_.wait_for(hold, std::chrono::duration<double>(seconds), there);
}

void Reads::set_guess_bytes(size_t nbytes) {
  std::lock_guard hold(lock_);
  const bool more = nbytes > guess_bytes;
  guess_bytes = nbytes;
  if (more && !guesses_.empty()) work_.notify_all();
}

void Reads::promote(const std::shared_ptr<ReadBatch>& batch) {
  std::lock_guard hold(lock_);
  if (!batch->queued || !batch->guess) return;
  guesses_.erase({batch->deadline, batch->number});
  batch->guess = false;
  batch->asked = now();
  demands_.push_back(batch);
  work_.notify_all();
}

void Reads::unqueue(const std::shared_ptr<ReadBatch>& batch) {
  batch->queued = false;
  if (batch->guess) {
    guesses_.erase({batch->deadline, batch->number});
  } else {
    std::erase(demands_, batch);
  }
}

void Reads::cancel(const std::shared_ptr<ReadBatch>& batch, bool everything) {
  int taken = 0;
  {
    std::lock_guard hold(lock_);
    if (!batch->queued || !(batch->guess || everything)) return;
    unqueue(batch);
    taken = static_cast<int>(batch->runs.size() - batch->next);
    if (batch->state == reading_fine) batch->state = reading_cancelled, batch->failed = batch->next;
    batch->next = batch->runs.size();
  }
  finish(*batch, taken);
}

void Reads::stop() {
  std::vector<std::shared_ptr<ReadBatch>> queued;
  std::vector<std::thread> threads;
  {
    std::lock_guard hold(lock_);
    stopped_ = true;
    queued.assign(demands_.begin(), demands_.end());
    for (auto& [key, batch] : guesses_) queued.push_back(batch);
    demands_.clear();
    guesses_.clear();
    threads.swap(threads_);
    for (auto& batch : queued) {
      batch->queued = false;
      if (batch->state == reading_fine) batch->state = reading_closed, batch->failed = batch->next;
    }
  }
  for (auto& batch : queued) finish(*batch, static_cast<int>(batch->runs.size() - batch->next));
  work_.notify_all();
  for (std::thread& thread : threads) thread.join();
}

std::vector<ReadLog> Reads::take_log() {
  std::vector<ReadLog> out;
  std::lock_guard hold(lock_);  // no thread is added meanwhile
  for (Log& log : logs_) {
    std::lock_guard own(log.lock);
    out.insert(out.end(), log.rows.begin(), log.rows.end());
    log.rows.clear();
  }
  return out;
}

double Reads::processor() const {
  const size_t nbytes = bytes_read;
  return nbytes ? 1e-9 * static_cast<double>(spent_) / static_cast<double>(nbytes) : 0;
}

void Reads::set_logging(bool on) {
  if (on && !logging) take_log();
  logging = on;
}

// The next read, if one may begin; under the lock.
bool Reads::take(Job& job) {
  std::shared_ptr<ReadBatch> batch;
  if (!demands_.empty()) {
    batch = demands_.front();
  } else if (!guesses_.empty() && guess_bytes > 0) {
    batch = guesses_.begin()->second;
    size_t nbytes = batch->runs[batch->next].nbytes;
    if (guessing_ && guessing_ + nbytes > guess_bytes) return false;
    guessing_ += nbytes;
  } else {
    return false;
  }
  // a guess may have been held back till now
  job = {batch, batch->next++, batch->guess, batch->guess ? now() : batch->asked};
  if (batch->next == batch->runs.size()) {
    batch->queued = false;
    if (batch->guess) {
      guesses_.erase(guesses_.begin());
    } else {
      demands_.pop_front();
    }
  }
  return true;
}

void Reads::work(Log& log) {
#ifdef __linux__
  prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
#endif
  std::vector<char> bounce;
  for (;;) {
    Job job;
    double until = 0;
    {
      std::unique_lock hold(lock_);
      work_.wait(hold, [&] { return take(job) || stopped_; });
      if (!job.batch) return;
      if (options_.bandwidth > 0) {
        const ReadRun& run = job.batch->runs[job.run];
        free_at_ = std::max(free_at_, job.asked + options_.latency) + run.nbytes / options_.bandwidth;
        until = free_at_;
      }
    }
    ReadBatch& batch = *job.batch;
    const ReadRun& run = batch.runs[job.run];
    const int64_t spent = processor_time();
    double began = now();
    if (until > 0 && options_.latency > 0) sleep_until(job.asked + options_.latency);
    size_t asked = run.nbytes;
    int state = read(run, bounce, asked);
    if (until > 0) sleep_until(until);
    if (state == reading_fine) bytes_read += asked, reads += 1;
    if (state == reading_fine && logging) {
      std::lock_guard own(log.lock);
      log.rows.push_back({static_cast<double>(asked), began - job.asked, now() - began});
    }
    if (job.guess || state != reading_fine) {
      std::lock_guard hold(lock_);
      if (job.guess) guessing_ -= run.nbytes;
      if (state != reading_fine && batch.state == reading_fine) batch.state = state, batch.failed = job.run;
    }
    if (job.guess) work_.notify_one();
    spent_ += processor_time() - spent;
    finish(batch, 1);
  }
}

void Reads::finish(ReadBatch& batch, int runs) {
  if (!runs) return;
  // The last one widens before anybody is told.
  int left = batch.left.load();
  for (;;) {
    if (left == runs) {
      if (batch.state == reading_fine) {
        for (const Widening& w : batch.widenings) widen(w);
      }
      {
        std::lock_guard hold(lock_);
        batch.ended = now();
        batch.left.store(0, std::memory_order_release);
      }
      landed_.notify_all();
      return;
    }
    if (batch.left.compare_exchange_weak(left, left - runs)) return;
  }
}

int Reads::read(const ReadRun& run, std::vector<char>& bounce, size_t& asked) {
  int fd = fds_[run.file];
  int64_t block = static_cast<int64_t>(options_.block), start = run.offset / block * block;
  int64_t end = run.offset + static_cast<int64_t>(run.nbytes);
  if (!options_.direct) {
    int state = fill(fd, run.parts, run.offset);
#ifdef __linux__
    if (options_.drop_behind && state == reading_fine) {
      posix_fadvise(fd, start, (end - start + block - 1) / block * block, POSIX_FADV_DONTNEED);
    }
#endif
    return state;
  }
  int64_t size = (end - start + block - 1) / block * block, got = 0, wanted = end - start;
  if (static_cast<int64_t>(bounce.size()) < size + block) bounce.resize(size + block);
  auto address = reinterpret_cast<uintptr_t>(bounce.data());
  char* buffer = bounce.data() + (block - address % block) % block;
  while (got < wanted) {
    ssize_t n = pread(fd, buffer + got, size - got, start + got);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return errno;
    if (got + n >= wanted) break;
    // Less than asked: an interruption, or the file's end; the next read must start at a block.
    struct stat status;
    if (n == 0 || fstat(fd, &status) != 0 || status.st_size < end) return reading_ended;
    got = (got + n) / block * block;
  }
  const char* from = buffer + (run.offset - start);
  for (const iovec& part : run.parts) {
    std::memcpy(part.iov_base, from, part.iov_len);
    from += part.iov_len;
  }
  asked = static_cast<size_t>(size);
  return reading_fine;
}

}  // namespace streamer
