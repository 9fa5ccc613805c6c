# Sourced by the other scripts: makes .venv once, installs evomerge into it, and puts it on the PATH.
# A GPU user sets EVOMERGE_CONSTRAINTS=/dev/null to let pip choose a CUDA build of torch.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

constraints=${EVOMERGE_CONSTRAINTS:-scripts/constraints.txt}
extras=${EVOMERGE_EXTRAS:-}
stamp=.venv/.evomerge-installed${extras//[^a-z]/-}
[ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ "$constraints" -nt "$stamp" ]; then
  echo "Installing evomerge into .venv (a few minutes the first time) ..." >&2
  # torch first, and exactly: a looser request would fetch gigabytes of CUDA on a CPU machine.
  .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c "$constraints" torch
  .venv/bin/python -m pip install --quiet --no-compile --disable-pip-version-check -c "$constraints" -e ".$extras"
  # pip would compile one file after the other; some files of packages are templates, which cannot be compiled
  .venv/bin/python -m compileall -qq -j 0 .venv/lib || true
  touch "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
