// Positional reads in threads of their own: what waits for a disk must not wait for Python's lock.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

namespace streamer {

// `nbytes` bytes at `offset` of file number `file`, into `at`.
struct ReadPiece {
  int file;
  int64_t offset;
  char* at;
  size_t nbytes;
};

// 16-bit floats to float32, once they are there; brain: bfloat16.
struct Widening {
  const uint16_t* from;
  float* to;
  size_t count;
  bool brain;
};

struct ReadRun {
  int file;
  int64_t offset;
  size_t nbytes;
  std::vector<iovec> parts;
};

// How one read went, in seconds since it was asked for.
struct ReadLog {
  double nbytes, queued, seconds;  // Python takes many of them as one array
};

enum ReadState { reading_fine = 0, reading_ended = -1, reading_cancelled = -2, reading_closed = -3 };

// The reads of one call. Reads that have not begun can be taken back as long as they are guesses.
struct ReadBatch {
  std::vector<ReadRun> runs;
  std::vector<Widening> widenings;
  std::atomic<int> left{0};
  size_t next = 0;  // the first run that is not begun
  double asked = 0, deadline = 0, ended = 0;  // when
  uint64_t number = 0;
  bool guess = false, queued = false;
  int state = reading_fine;  // or errno; under the engine's lock
  size_t failed = 0;         // the run it is about
};

struct ReadOptions {
  int threads = 4;
  bool direct = false, drop_behind = false;
  size_t block = 4096, gap = 16 << 10, chunk_min = 256 << 10, chunk_max = 1 << 20;
  double bandwidth = 0, latency = 0;  // of a disk to imitate; 0: none
  size_t guess_bytes = 1 << 20;
};

// Demands first come first served, then guesses by deadline, no more than guess_bytes under way.
class Reads {
 public:
  Reads(std::vector<int> fds, ReadOptions options);
  ~Reads();

  std::shared_ptr<ReadBatch> submit(
      std::vector<ReadPiece> pieces, std::vector<Widening> widenings, std::optional<double> guess);
  // Whether all of it is there, or never will be; waits so long for it.
  bool wait(ReadBatch& batch, double seconds);
  void promote(const std::shared_ptr<ReadBatch>& batch);
  // Guesses that have not begun; everything: demands too, since nobody waits any more.
  void cancel(const std::shared_ptr<ReadBatch>& batch, bool everything = false);
  void stop();
  void set_guess_bytes(size_t nbytes);
  // Of the reads that have ended, while logging; in order for each thread only.
  std::vector<ReadLog> take_log();
  double processor() const;  // seconds of it that a byte has taken; 0 before the first
  void set_logging(bool on);  // from off to on: begins with none

  std::atomic<size_t> bytes_read{0}, reads{0}, guess_bytes;
  std::atomic<bool> logging{false};

 private:
  using Key = std::pair<double, uint64_t>;
  struct Job {
    std::shared_ptr<ReadBatch> batch;
    size_t run = 0;
    bool guess = false;
    double asked = 0;
  };

  // Of one thread, which is nearly always alone with it.
  struct Log {
    std::mutex lock;
    std::vector<ReadLog> rows;
  };

  void start();
  void work(Log& log);
  bool take(Job& job);
  int read(const ReadRun& run, std::vector<char>& bounce, size_t& asked);
  void finish(ReadBatch& batch, int runs);
  void unqueue(const std::shared_ptr<ReadBatch>& batch);

  std::vector<int> fds_;
  ReadOptions options_;
  std::mutex lock_;
  std::condition_variable work_, landed_;
  std::deque<std::shared_ptr<ReadBatch>> demands_;
  std::map<Key, std::shared_ptr<ReadBatch>> guesses_;
  std::vector<std::thread> threads_;
  std::deque<Log> logs_;  // by thread
  std::atomic<int64_t> spent_{0};  // nanoseconds of their processor time
  size_t guessing_ = 0;
  uint64_t numbers_ = 0;
  double free_at_ = 0;
  bool all_ = false, stopped_ = false;  // all_: of the threads that there can be
};

}  // namespace streamer
