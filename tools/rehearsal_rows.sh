#!/bin/sh
# Cells of the executors' table, pinned to two cores: rehearsal_rows.sh OUT FIRST_CORE [CELL...]
# A cell is model:pool:disk, such as demo-1MB:50:1.5 (disk in GB/s, 0 as it comes); all when none.
#   MODELS=folder TOKENS=24 ROUNDS=4 sh tools/rehearsal_rows.sh cells.jsonl 2 demo-1MB:50:1.5
out=$1; core=$2; shift 2
models=${MODELS:-.}
if [ $# = 0 ]; then
  for m in demo-1MB demo-250KB demo-3MB; do for p in 50 75 25 12; do for d in 1.5 0.5 5 0; do
    set -- "$@" $m:$p:$d
  done; done; done
fi
for cell; do
  m=${cell%%:*}; rest=${cell#*:}; p=${rest%%:*}; d=${rest#*:}
  taskset -c "$core,$((core + 1))" ${PYTHON:-.venv/bin/python} -m tools.rehearsal_table run "$models/$m" \
    --pools "$p" --disks "$d" --tokens "${TOKENS:-24}" --rounds "${ROUNDS:-4}" --out "$out" 2>&1 | grep '^|'
done
