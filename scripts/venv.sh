# Sourced by quickstart.sh, test.sh and docs.sh: makes and enters .venv with Python 3.11 to 3.13, and installs the project in it.
#
#     install EXTRAS      for instance `install "[test]"`; $PYTHON names the interpreter where the right one is not found

cd "$(dirname "${BASH_SOURCE[0]}")/.."

# In bytes: what a training step frees stays for the next one, in place of going back to Linux and being asked for again.
export MALLOC_MMAP_THRESHOLD_=67108864 MALLOC_TRIM_THRESHOLD_=536870912

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11, 3.12 or 3.13 was not found; install one, or name it: PYTHON=/path/to/python3.11 bash $0" >&2
    return 1
}

install() {
    local python stamp wanted
    if ! .venv/bin/python -c '' 2>/dev/null; then
        python="$(find_python)"
        echo "making .venv with $("$python" --version)"
        rm -rf .venv
        "$python" -m venv .venv
    fi
    # A second run installs nothing where the project file is the same.
    stamp=".venv/.installed$1"
    wanted="$(cksum < pyproject.toml)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing mmssl$1 (torch and its CUDA libraries are several GB; the first time takes minutes)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".$1" 2>&1 | { grep -v '^WARNING: Location' || true; }
        echo "$wanted" > "$stamp"
    fi
}
