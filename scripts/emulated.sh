#!/bin/sh
# What tests/kernels/emulated needs to run the kernels for ARM on another processor, on Debian and its kin: QEMU and a
# compiler (as root where they are missing), and a Python for ARM in .venv/arm64. It says nothing if all goes well.
#   sh scripts/emulated.sh            installs
#   sh scripts/emulated.sh test ...   and runs those tests: what is absent is a failure here, and no skip
set -eu
cd "$(dirname "$0")/.."
sh scripts/ready.sh
if ! command -v qemu-aarch64 >/dev/null || ! command -v aarch64-linux-gnu-g++ >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        qemu-user g++-aarch64-linux-gnu libc6-dev-arm64-cross >/dev/null
fi
root=$PWD/.venv/arm64
if [ ! -e "$root/usr/bin/python3" ]; then
    # a package index of its own: the machine's stays as it is, and no root is needed
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial" "$work/packages" "$work/root"
    touch "$work/state/status"
    cat > "$work/apt.conf" <<END
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Sandbox::User "";
Dir::State "$work/state";
Dir::State::status "$work/state/status";
Dir::Cache "$work/cache";
END
    export APT_CONFIG="$work/apt.conf"
    apt-get update -qq
    python=$(apt-cache show python3-minimal | sed -n 's/^Pre-Depends: .*\(python3\.[0-9]*\)-minimal.*/\1/p' | head -n 1)
    (cd "$work/packages" && apt-get download -qq libc6 libgcc-s1 libstdc++6 zlib1g libexpat1 libffi8 python3-minimal \
        "$python-minimal" "lib$python-minimal" "lib$python-stdlib" "lib$python-dev")
    for package in "$work"/packages/*.deb; do dpkg -x "$package" "$work/root"; done
    [ -e "$work/root/lib" ] || ln -s usr/lib "$work/root/lib"  # where the loader is looked for
    rm -rf "$root"
    mkdir -p "$root"
    cp -a "$work/root/." "$root"
fi
if [ "${1:-}" = test ]; then
    shift
    export COMPRESSOR_TEST_EMULATED=1 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
    .venv/bin/python -m pytest -n "${TEST_PROCESSES:-2}" tests/kernels/emulated "$@"
fi
