"""Make a virtual environment with pip, on systems whose Python comes without ensurepip as well (bare Debian).

Usage: python3 scripts/make_venv.py FOLDER
"""

import os
import re
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import venv


def fetch_pip(folder):
    """Download the newest pip wheel from the package index into ``folder``."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"
    page = urllib.request.urlopen(index, timeout=60).read().decode()
    wheels = re.findall(r'href="([^"]+/pip-(\d+(?:\.\d+)+)-py3-none-any\.whl[^"]*)"', page)
    if not wheels:
        sys.exit(f"found no pip wheel at {index}")
    link, _ = max(wheels, key=lambda wheel: [int(part) for part in wheel[1].split(".")])
    url = urllib.parse.urljoin(index, link).partition("#")[0]
    path = f"{folder}/{url.rsplit('/', 1)[1]}"
    urllib.request.urlretrieve(url, path)
    return path


def main():
    if sys.version_info < (3, 10):  # noqa: UP036  # any Python may run this file
        sys.exit(
            f"compressor needs Python 3.10 or newer, this is {sys.version.split()[0]}; set PYTHON=/path/to/python3"
        )
    target = sys.argv[1]
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        venv.create(target, with_pip=False, clear=True)
        python = f"{target}/bin/python"
        with tempfile.TemporaryDirectory() as folder:
            wheel = fetch_pip(folder)
            subprocess.run([python, f"{wheel}/pip", "install", "--quiet", wheel], check=True)
    else:
        venv.create(target, with_pip=True, clear=True)


main()
