# Takes out of an environment what no process reads: `slim.sh PREFIX`.
set -eu
# Tests of libraries; torch's and sympy's `testing` packages are imported, and stay.
find "$1" -type d -name tests -prune -exec rm -rf {} +
find "$1" \( -path '*/numpy/f2py' -o -path '*/numpy/_core/include' \) -prune -exec rm -rf {} +
find "$1" -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.a' \) -delete
# Downloads from a model hub go without it; who has torch may want them fast.
test -d "$1"/lib/python3*/site-packages/torch || rm -rf "$1"/lib/python3*/site-packages/hf_xet*
# Of a learner's image alone is anything drawn: elsewhere matplotlib is there because cellpylib imports it.
packages=$(echo "$1"/lib/python3*/site-packages)
if test -d "$packages/cellpylib" && ! test -d "$packages/torch"; then
    for name in matplotlib mpl_toolkits fontTools fonttools PIL pillow kiwisolver contourpy pyparsing; do
        rm -rf "$packages/$name" "$packages/$name"-*.dist-info "$packages/$name.libs"
    done
    cp -r no_plots/* "$packages"
fi
# Wheels come with debug symbols of some tens of MB. What auditwheel has moved about (NAME.libs) must not be stripped, and
# torch's need not.
find "$1" -name '*.so*' -type f -not -path '*.libs/*' -not -path '*/torch/*' -exec strip --strip-unneeded {} + 2>/dev/null || true
# The launcher speaks to Kubernetes in plain values: a class for every kind and call is 70 MB that nobody reads.
find "$1" \( -path '*/kubernetes/client/*' -o -path '*/kubernetes/aio/client/*' \) \
    \( -path '*/client/api/*' -o -path '*/client/models/*' \) -name '*.py' -not -name __init__.py -delete
