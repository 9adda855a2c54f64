#!/bin/bash
# The kernel tests on a native library built with sanitizers: "memory" is AddressSanitizer and
# UndefinedBehaviorSanitizer, "threads" is ThreadSanitizer.
# Usage: tests/sanitize.sh memory|threads [python] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
checks=${1:?memory or threads}
python=$(command -v "${2:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")  # CMake ignores relative ones
shift $(($# < 2 ? $# : 2))
build=build/sanitize-$checks
mkdir -p build

# Kernels are compiled for what the tests run on: every instruction set that this machine has, or,
# as threads share work alike on all, the best one. (Half of a build is kernels.)
expression='";".join(kernels.available_isas())'
if [ "$checks" = threads ]; then expression='kernels.isa()'; fi
isas=$("$python" -c "from aerogel import kernels
print($expression if kernels.native_available() else '')")

generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
cmake -S . -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=None -DAEROGEL_SANITIZE="$checks" \
  ${isas:+-DAEROGEL_ISAS="$isas"} -DPython_EXECUTABLE="$python" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" --parallel 2 >>"$build.log" 2>&1 || { tail -50 "$build.log"; exit 1; }

AEROGEL_NATIVE="$PWD/$(ls "$build"/_native*.so)"
export AEROGEL_NATIVE OMP_NUM_THREADS=2
compiler=${CXX:-c++}
library() { "$compiler" -print-file-name="$1"; }
# The interpreter is not instrumented, so the sanitizers' run-time has to come first.
sanitized() { LD_PRELOAD=$preload "$@"; }

if [ "$checks" = memory ]; then
  # CPython and torch keep memory until the process ends: leaks are not looked for.
  preload="$(library libasan.so) $(library libubsan.so) $(library libstdc++.so)"
  export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
  if [ $# -eq 0 ]; then set -- tests/kernels; fi
  sanitized "$python" -m pytest -q -m "not slow" -p no:cacheprovider "$@"
  exit
fi

preload="$(library libtsan.so) $(library libstdc++.so)"
reports=$build/reports
rm -rf "$reports" && mkdir "$reports"
export TSAN_OPTIONS="exitcode=66 ignore_noninstrumented_modules=1 \
history_size=4 log_path=$PWD/$reports/race"
# ThreadSanitizer's shadow memory leaves little room for a randomised layout of the address space.
fixed=()
if setarch "$(uname -m)" -R true 2>/dev/null; then fixed=(setarch "$(uname -m)" -R); fi
sanitized() { "${fixed[@]}" env LD_PRELOAD="$preload" "$@"; }

# A check that finds nothing must be known to find what is there, and only that.
for overlap in 0 1; do
  status=0
  sanitized "$python" -c "from aerogel.kernels._library import native
native().write_neighbours($overlap)" || status=$?
  if [ $status -ne $((overlap * 66)) ]; then
    cat "$reports"/* 2>/dev/null || true
    echo "ThreadSanitizer ended with $status for tasks that overlap by $overlap floats"; exit 1
  fi
done
grep -q "data race .*csrc/sanitize/race.cpp" "$reports"/*
rm "$reports"/*

if [ $# -eq 0 ]; then set -- tests/kernels/test_threads.py tests/runtime/test_calls.py -k "threads or concurrent"; fi
sanitized "$python" -m pytest -q -m "not slow" -p no:cacheprovider "$@" ||
  { cat "$reports"/* 2>/dev/null; exit 1; }
