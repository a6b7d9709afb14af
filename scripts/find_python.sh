#!/bin/sh
# Prints the path of a Python that can make .venv, or fails.
#
# The newest suitable one on PATH wins, then the newest that pyenv holds. Each
# candidate is run: a shim may exist and fail, a name says nothing about the
# version, and some distributions split venv and ensurepip off.
set -u

probe='
import ensurepip, sys, sysconfig, venv
v = sys.version_info
suitable = (
  v >= (3, 12)
  and v.releaselevel == "final"
  and sys.implementation.name == "cpython"
  and not sysconfig.get_config_var("Py_GIL_DISABLED")
)
if not suitable:
  sys.exit(1)
print(f"{v.major:d}{v.minor:03d}{v.micro:03d} {sys.executable}")
'

newest() {
  found=$(
    for candidate in "$@"; do
      "$candidate" -c "$probe" 2>/dev/null
    done | sort -rn | head -n 1
  )
  [ -n "$found" ] && printf '%s\n' "${found#* }"
}

# make PYTHON=/path/to/python: that one or none.
if [ -n "${PYTHON:-}" ]; then
  newest "$PYTHON" && exit 0
  echo "PYTHON=$PYTHON does not run, or is not CPython 3.12 or newer" \
    "with venv and ensurepip." >&2
  exit 2
fi

newest python3.14 python3.13 python3.12 python3 ||
  newest "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin/python \
    "${HOME:-}"/.pyenv/versions/*/bin/python
