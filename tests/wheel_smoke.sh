#!/usr/bin/env bash
# The built wheel works on its own: unpacked away from the checkout, it packs, multiplies and saves.
# Usage: wheel_smoke.sh PYTHON DIST_DIR
set -euo pipefail
python=$(realpath -s "$1")
wheel=$(ls "$2"/aerogel-*.whl)
sdist=$(ls "$2"/aerogel-*.tar.gz)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

"$python" -m zipfile -e "$wheel" "$site"
tar -tzf "$sdist" | sed 's|^[^/]*/||' >"$site/sdist.txt"
for source in CMakeLists.txt pyproject.toml $(find csrc src -type f \
  ! -name '*.so' ! -path '*/__pycache__/*' ! -path '*.egg-info/*'); do
  grep -qxF "$source" "$site/sdist.txt" || { echo "the sdist lacks $source"; exit 1; }
done
cd "$site"
# The finder of the editable install would win over the wheel: it is taken out.
"$python" - "$site" <<'PY'
import importlib.metadata, pathlib, sys

site = sys.argv[1]
sys.meta_path[:] = [f for f in sys.meta_path if "Redirecting" not in type(f).__name__]
sys.path.insert(0, site)
import torch

import aerogel
from aerogel import kernels

assert pathlib.Path(aerogel.__file__).is_relative_to(site), aerogel.__file__
assert kernels.native_available(), "the wheel carries no native kernels"
requires = [r for r in importlib.metadata.distribution("aerogel").requires or [] if r.startswith("torch")]
assert requires and all("==" not in r for r in requires), f"the wheel pins torch: {requires}"
weight = torch.randn(64, 32) * (torch.rand(64, 32) > 0.9)
x = torch.randn(1, 32, 7, 7)
got = kernels.spmm(x, kernels.BlockRowWeight.pack(weight))
torch.testing.assert_close(got, torch.einsum("nk,bkhw->bnhw", weight, x), rtol=1e-5, atol=1e-5)
aerogel.save({"w": weight}, "w.safetensors")
assert torch.equal(aerogel.load("w.safetensors")["w"], weight)
print(f"wheel works on its own ({kernels.isa()})")
PY
