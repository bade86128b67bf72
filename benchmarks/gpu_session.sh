#!/bin/bash
# Build, check and time on a lent GPU, in commands of at most ten minutes each.
#
#   bash benchmarks/gpu_session.sh [build|sanitize|test|ops|e2e ...]     default: all, in this order
#
# Run in the repository's root. Logs and results go to $OUT (default build/gpu-out) as they are
# made, so that an interrupted command loses nothing: $OUT/<piece>.log, $OUT/<device>/<area>.json,
# which belong into benchmarks/results/<device>/: with those of an earlier command put there, the
# benchmarks go on where they stopped.
#
#   WHEELS=.whl    a folder of wheels that this Python lacks (`make gpu-wheels` fetches them where
#                  there is a network), put beside its packages, not into them
#   COMMIT=...     the commit of these sources, where .git did not travel with them
#   LIMIT=570      seconds for all pieces together: each gets what is left
#
# Worth most first, in three commands: "build test", "e2e", "ops sanitize".
set -u
OUT=${OUT:-build/gpu-out}
LIMIT=${LIMIT:-570}
WHEELS=${WHEELS:-.whl}
PYTHON=${GPU_PYTHON:-python3}
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 COMMIT=${COMMIT:-}
mkdir -p "$OUT"
RESULTS=benchmarks/results
MARK=$(mktemp)

if compgen -G "$WHEELS/*.whl" >/dev/null; then
    SITE=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
        --target "$SITE" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi

collect() { # what is newer than the start, into $OUT/<device>/
    find "$RESULTS" -name '*.json' -newer "$MARK" | while read -r file; do
        folder="$OUT/$(basename "$(dirname "$file")")"
        mkdir -p "$folder" && cp "$file" "$folder/"
    done
}

(while sleep 10; do collect; done) >/dev/null 2>&1 &
COLLECTOR=$!
trap 'kill $COLLECTOR 2>/dev/null; collect; rm -f "$MARK"' EXIT

piece() { # piece NAME TARGET: one make target, within what is left
    local left=$((LIMIT - SECONDS))
    if [ "$left" -lt 30 ]; then
        echo "== $1: left out, $left s are left" | tee "$OUT/$1.log"
        return 1
    fi
    echo "== $1: at most $left s"
    local budget=$((left > 60 ? left - 40 : 20))
    timeout --kill-after=5 "$left" make --no-print-directory "$2" GPU_PYTHON="$PYTHON" \
        GPU_BUDGET="$budget" >"$OUT/$1.log" 2>&1
    local code=$?
    tail -n 25 "$OUT/$1.log"
    echo "== $1: exit code $code, $SECONDS s in all"
    return $code
}

WORST=0
[ $# -eq 0 ] && set -- build sanitize test ops e2e
for name in "$@"; do
    case "$name" in
        build | sanitize | test) target=gpu-$name ;;
        ops | e2e) target=gpu-bench-$name ;;
        *) echo "pieces are build, sanitize, test, ops and e2e, got $name" >&2; exit 2 ;;
    esac
    piece "$name" "$target" || WORST=1
    if [ "$name" = build ] && [ "$WORST" -ne 0 ]; then break; fi
done
exit $WORST
