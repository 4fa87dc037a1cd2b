#!/usr/bin/env bash
# Everything that needs a GPU, in the order in which a failure is cheapest: the suite on `cuda`,
# compute-sanitizer over the op tests, then the benchmarks, recorded in bench/results/.
#   bench/gpu.sh [wheel]    installs the wheel first when one is given
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-bench/results}

[ $# -ge 1 ] && "$python" -m pip install --no-deps --force-reinstall "$1"
"$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"'
"$python" -c 'import pumice; print(pumice.doctor())'

# The suite on cuda, and every PTX wrapper in both bodies, which must agree bit for bit. For the
# latter: cmake -S tests/emulator -B build/emulator -DPUMICE_SELFTEST_CUDA=ON, and build.
"$python" -m pytest -q tests/ops tests/cuda tests/decode -k cuda 2>&1 | tee "$out/pytest.log"
"$python" -m pytest -q tests/emulator/test_on_gpu.py 2>&1 | tee -a "$out/pytest.log"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -m pytest -q -x tests/ops \
      -k "cuda and not compile and not export and not opcheck" 2>&1 | tee "$out/$tool.log"
  done
fi
for op in int8 int4 sparse24 sampling cache; do
  "$python" -m bench "$op" --device cuda --record
done
# Where dequantizing for torch's product overtakes int4_gemm: kInt4DequantizeFrom, projected as 512.
"$python" -m bench int4 --device cuda --m 128,256,384,511 2>&1 | tee "$out/int4_crossover.log"
# Where decompressing for torch's product overtakes sparse24_gemm: sparse24_dense_from, never so far.
PUMICE_SPARSE24_DENSE_FROM=1 "$python" -m bench sparse24 --device cuda --m 128,256,512,1024,4096 \
  2>&1 | tee "$out/sparse24_dense.log"
"$python" -m bench attention --device cuda --record --png "$out/attention.png"
"$python" -m bench paged --device cuda --record --png "$out/paged.png"
"$python" -m bench readme
