#!/usr/bin/env bash
# What a machine with a GPU can prove and measure in nine minutes: bench/first_run/README.md.
#
#     bash bench/first_run.sh SOURCE RESULTS [SECONDS]
#
# SOURCE is a checkout, RESULTS a folder that gets at most eight files. FIRST_RUN_DRY=1 takes the same
# steps without a GPU.
set -u

usage="usage: first_run.sh SOURCE RESULTS [SECONDS]"
source_tree=$(cd "${1:?$usage}" && pwd) || exit 2
mkdir -p "${2:?$usage}" && results=$(cd "$2" && pwd) || exit 2
budget=${3:-525}
dry=${FIRST_RUN_DRY:-}

# The interpreter itself, not a shim that chooses one, and the tools where NVIDIA puts them.
python=$(python3 -c 'import sys; print(sys.executable)') || exit 2
export PATH="$(dirname "$python"):$PATH:/usr/local/cuda/bin"
for folder in /opt/nvidia/nsight-compute/*/; do PATH=$PATH:${folder%/}; done
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export FIRST_RUN_SEED=${FIRST_RUN_SEED:-1} HOGWILD_TEST_SEED=${HOGWILD_TEST_SEED:-1}

work=$(mktemp -d)
parts=$source_tree/bench/first_run
summary=$results/1-summary.txt
: >"$summary"
failures=0

say() { printf '%4d s  %s\n' "$SECONDS" "$*" | tee -a "$summary"; }
left() { echo $((budget - SECONDS)); }
at_most() { local n; n=$(left); echo $(($1 < n ? $1 : n)); }

finish() {
  trap - EXIT INT TERM
  # shellcheck disable=SC2046
  kill $(jobs -p) 2>/dev/null
  say "end: $failures failed; $(find "$results" -type f | wc -l) files"
  rm -rf "$work"
  exit $((failures > 0))
}
trap finish EXIT INT TERM

# how CODE SECONDS: what became of a command that was given so many.
how() {
  case $1 in
    0) echo ok ;;
    124 | 137) echo "STOPPED after $2 s" ;;
    *) echo "FAILED with exit code ${1:-unknown}" ;;
  esac
}

# step NAME SECONDS LOG COMMAND...: appends what the command prints to LOG, and its lines that begin
# with "> " to the summary.
step() {
  local name=$1 log=$results/$3 said=$work/said began=$SECONDS limit code
  limit=$(at_most "$2")
  shift 3
  if ((limit < 15)); then
    say "$name: left out, there is no time"
    return 1
  fi
  (cd "$work" && timeout -k 5 "$limit" "$@") >"$said" 2>&1
  code=$?
  { printf '\n==== %s\n' "$name" && cat "$said"; } >>"$log"
  failures=$((failures + (code > 0)))
  say "$name: $(how $code "$limit"), $((SECONDS - began)) s"
  grep '^> ' "$said" | cut -c 1-400 | tail -n 60 >>"$summary"
  return $code
}

# beside NAME SECONDS COMMAND...: starts the command; `together` waits for all that were started.
beside() {
  local name=$1 limit=$2
  shift 2
  (cd "$work" && timeout -k 5 "$limit" "$@" >"$work/beside.$name" 2>&1; echo $? >"$work/code.$name") &
  beside_all+=("$!")
}
beside_all=()

# tell NAME SECONDS LOG PATTERN: how it ended, with the last line that has the pattern.
tell() {
  local code
  code=$(cat "$work/code.$1" 2>/dev/null)
  { printf '\n==== %s\n' "$1" && head -c 3000000 "$work/beside.$1"; } >>"$results/$3"
  [[ $code == 0 ]] || failures=$((failures + 1))
  say "$1: $(how "$code" "$2"); $(grep -E "$4" "$work/beside.$1" | tail -n 1 | cut -c 1-150)"
}

# ---- 1. the machine --------------------------------------------------------------------------------

ask_gpu() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null | head -n 1; }
{
  nvidia-smi
  nvidia-smi --query-gpu=name,compute_cap,driver_version,clocks.sm,clocks.mem,power.limit --format=csv
  nvcc --version
  "$python" -VV
  lscpu | sed -n '/Model name/p; /^CPU(s)/p'
  "$python" -m pip list | grep -iE '^(torch|numpy|pybind11|cmake|ninja|pytest|hypothesis|transformers|triton|nvidia-cuda|flash)'
  for tool in compute-sanitizer ncu; do echo "$tool: $(command -v $tool || echo none)"; done
} >"$results/2-machine.txt" 2>&1
capability=$(ask_gpu compute_cap | tr -d '. ')
say "the machine: $(ask_gpu name,driver_version || true), compute capability ${capability:-unknown}"
if [[ -z $dry && -z $capability ]]; then
  say "nvidia-smi shows no GPU"
  failures=1
  exit
fi

# ---- 2. build --------------------------------------------------------------------------------------

build_with_cmake() { # for a machine whose pip or setuptools is too old for pyproject.toml
  set -e
  cmake -S "$tree" -B cmake -DCMAKE_BUILD_TYPE=Release -DHOGWILD_CUDA=ON \
    "-DHOGWILD_CUDA_ARCHS=$HOGWILD_CUDA_ARCHS" -DHOGWILD_VERSION=0 -DPython_EXECUTABLE="$python" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
  cmake --build cmake --parallel "$CMAKE_BUILD_PARALLEL_LEVEL"
  mkdir -p "$site"
  cp -r "$tree/hogwild_ext" "$site/"
  cp cmake/_C.*.so "$site/hogwild_ext/"
}
export -f build_with_cmake
export python tree=$work/tree site=$work/site
export HOGWILD_CUDA=1 HOGWILD_CUDA_ARCHS=${capability:-90}
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
# A copy: a build writes into its source.
mkdir "$tree"
tar -C "$source_tree" -cf - --exclude=.git --exclude=build --exclude='*.egg-info' --exclude='.venv*' \
  --exclude='*.so' . | tar -C "$tree" -xf -
if [[ -n $dry && -n ${FIRST_RUN_SITE:-} ]]; then
  site=$FIRST_RUN_SITE
else
  step "build with pip" 170 3-build.log \
    "$python" -m pip install --no-build-isolation --no-deps --no-index -v --target "$site" "$tree" ||
    step "build with CMake alone" 150 3-build.log bash -c build_with_cmake ||
    {
      say "nothing was built: see 3-build.log"
      exit
    }
fi
HOGWILD_MODULE=$(find "$site/hogwild_ext" -name '_C.*.so' | head -n 1)
export HOGWILD_MODULE PYTHONPATH=$site:$tree/tests
"$python" -m hogwild_ext info >>"$results/2-machine.txt" 2>&1

# ---- 3. does it compute the right thing? -----------------------------------------------------------

kernels=("$python" "$parts/kernels.py")
right=1
which=all
[[ -n $dry ]] && which=few
step "kernels without torch, against float64" 90 4-right.log "${kernels[@]}" $which || right=0
step "graphs and large scores" 60 4-right.log "$python" "$parts/graphs.py" || right=0

# What watches memory runs beside the tests: neither is timed.
limit=$(($(left) - 200))
limit=$((limit > 190 ? 190 : limit < 40 ? 40 : limit))
sanitizers=()
if [[ -z $dry ]] && command -v compute-sanitizer >/dev/null; then
  sanitizers=(memcheck racecheck synccheck initcheck)
  for tool in "${sanitizers[@]}"; do
    beside "$tool" "$limit" compute-sanitizer --tool "$tool" --print-limit 20 --error-exitcode 9 \
      "${kernels[@]}" few
  done
fi
if [[ -n $dry ]]; then
  suites=${FIRST_RUN_SUITES:-op_nonfinite}
  device=(HOGWILD_TEST_GPU=pretended HYPOTHESIS_PROFILE=quick)
else
  suites="op_oracle op_nonfinite op_bits cache emulated_layouts"
  device=(HOGWILD_TEST_GPU=1 HYPOTHESIS_PROFILE=ci)
fi
pytest=(OMP_NUM_THREADS=3 "$python" -m pytest -q -p no:cacheprovider --rootdir "$tree" --maxfail 25
  --tb short)
for suite in $suites; do
  beside "tests of $suite" "$limit" env "${device[@]}" "${pytest[@]}" "$tree/tests/test_$suite.py"
done
beside "tests on a GPU" "$limit" env "${pytest[@]}" -m gpu "$tree/tests/test_gpu.py" \
  -k "not suites_of_the_cpu"
wait "${beside_all[@]}"
for tool in ${sanitizers[@]+"${sanitizers[@]}"}; do
  tell "$tool" "$limit" 6-sanitizer.log 'ERROR SUMMARY|RACECHECK SUMMARY'
done
while read -r name; do
  tell "$name" "$limit" 5-tests.log ' (passed|failed|skipped|error)'
  grep -E '^(FAILED|ERROR) ' "$work/beside.$name" | cut -c 1-200 | head -n 12 >>"$summary"
done < <(echo "tests on a GPU" && printf 'tests of %s\n' $suites)

# ---- 4. how fast? ----------------------------------------------------------------------------------

if ((!right)); then
  say "no times: the kernels do not compute the right thing"
  exit
fi
limit=$(($(left) - 95))
limit=$((limit > 110 ? 110 : limit < 30 ? 30 : limit))
step "speed of a layer" $limit 7-speed.log "$python" "$parts/speed.py" $limit
if [[ -z $dry ]] && command -v ncu >/dev/null; then
  for workers in 1 8; do
    step "ncu, workers: $workers, at 32k" 45 8-bench.log ncu --clock-control none \
      -k 'regex:attend|merge' -c 2 --section SpeedOfLight --section MemoryWorkloadAnalysis \
      --section Occupancy --section LaunchStats --section WarpStateStats \
      --section SchedulerStats "${kernels[@]}" one $workers 32768
  done
  grep -E 'attend|merge|Duration|Throughput|Achieved Occupancy|Registers Per|Block Limit' \
    "$results/8-bench.log" | cut -c 1-120 | head -n 60 >>"$summary"
fi
bench=("$python" -m hogwild_ext bench attention --heads qwq --dtype bfloat16 --workers 1 4 --markdown)
on=(--device cuda)
[[ -n $dry ]] && on=(--gpu h100)
step "hogwild bench attention" 100 8-bench.log \
  "${bench[@]}" "${on[@]}" --context 4k 32k --step decode --segments few
if [[ -z $dry ]]; then
  step "hogwild bench attention, many segments and ragged" 60 8-bench.log \
    "${bench[@]}" "${on[@]}" --context 16k --step decode ragged --segments many
fi
ask_gpu clocks.sm,clocks.mem,temperature.gpu,power.draw >>"$results/2-machine.txt"
