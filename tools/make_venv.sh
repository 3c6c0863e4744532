#!/bin/sh
# Makes .venv with jaxft (editable) and its development tools; called by the Makefile alone.
# The stamp .venv/.installed is written last: without it .venv is taken for half made and made anew.
set -eu

oldest="3, 12"
found=""

say() { printf 'jaxft: %s\n' "$*"; }

# True if "$@" is a Python that is new enough and can make a virtual environment.
usable() {
    version=$("$@" -c 'import sys; print(*sys.version_info[:3], sep=".")' 2>/dev/null) || return 1
    "$@" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < ($oldest))" 2>/dev/null \
        && return 0
    found="$found${found:+, }$version at $(command -v "$1")"
    return 1
}

# The plain names come first: under pyenv they are what .python-version selects. A shim of pyenv
# may be there and still fail, hence the look at the versions that are installed.
make_venv() {
    for python in python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
        if usable "$python"; then
            say "making .venv with Python $version ($(command -v "$python"))"
            "$python" -m venv .venv
            return
        fi
    done
    if command -v uv >/dev/null; then
        say "making .venv with uv and Python 3.12"
        uv venv --quiet --python 3.12 --seed .venv
        return
    fi
    say "needs Python 3.12 or newer with its venv module, or uv; found ${found:-none}." \
        "Install one, for example with 'pyenv install 3.12' or your system's packages." >&2
    exit 1
}

started=$(date +%s)
if [ -f .venv/.installed ] && usable .venv/bin/python; then
    say "pyproject.toml is newer than .venv"
    rm .venv/.installed
else
    rm -rf .venv
    make_venv
fi
say "installing into .venv: a minute or two, longer on a slow network"
.venv/bin/python -m pip install -qq --disable-pip-version-check --editable '.[dev]'
touch .venv/.installed
say "installed in $(($(date +%s) - started)) s"
