#!/bin/bash
# The kernel tests on a native library built with AddressSanitizer and UndefinedBehaviorSanitizer.
# Usage: tests/sanitize.sh [python] [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${1:-python3}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")  # CMake ignores relative ones
shift || true
build=build/sanitize

generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
cmake -S . -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=None -DAEROGEL_SANITIZE=ON \
  -DPython_EXECUTABLE="$python" >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
cmake --build "$build" --parallel 2 >>"$build.log" 2>&1 || { tail -50 "$build.log"; exit 1; }

# The interpreter is not instrumented, so the sanitizers' run-time has to come first. CPython and
# torch keep memory until the process ends: leaks are not looked for.
compiler=${CXX:-c++}
export LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libubsan.so) \
$($compiler -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
export AEROGEL_NATIVE="$PWD/$(ls "$build"/_native*.so)"
export OMP_NUM_THREADS=2
if [ $# -eq 0 ]; then set -- tests/kernels; fi
"$python" -m pytest -q -m "not slow" -p no:cacheprovider "$@"
