# Takes out of an environment what no process reads, and compiles what is left: `slim.sh PREFIX`.
set -eu
# Tests of libraries; torch's and sympy's `testing` packages are imported, and stay.
find "$1" -type d -name tests -prune -exec rm -rf {} +
find "$1" -path '*/numpy/f2py' -prune -exec rm -rf {} +
find "$1" -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.a' \) -delete
# Wheels come with debug symbols of some tens of MB. What auditwheel has moved about (NAME.libs) must not be stripped.
find "$1" -name '*.so*' -type f -not -path '*.libs/*' -exec strip --strip-unneeded {} + 2>/dev/null || true
"$1/bin/python" -m compileall -q -j 0 "$1" >/dev/null || true
