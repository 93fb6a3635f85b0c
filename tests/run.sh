#!/bin/bash
# Runs every test that this machine can run, then says what was skipped and why. Called by `make test`.
set -uo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
beside=$(mktemp)
trap 'rm -f "$log" "$beside"' EXIT
# What runs in the background does not hear of ^C.
trap 'trap - TERM; kill 0' INT TERM

make --no-print-directory lint 2>&1 | tee -a "$log"
lint=${PIPESTATUS[0]}
# The suites print what they skip, so their output must not be captured. --no-fail-fast: one failure hides no other.
cargo test --workspace --exclude cella-tests --locked --no-fail-fast -- --nocapture --test-threads=2 2>&1 | tee -a "$log"
suites=${PIPESTATUS[0]}
# One suite at a time on KVM and beside it one of the others, each one test at a time: where KVM has no hardware, a guest needs
# a processor for its own.
on_kvm=(kvm templates)
others=(--lib --bins)
for suite in tests/tests/*.rs; do
    suite=$(basename "$suite" .rs)
    [[ " ${on_kvm[*]} " == *" $suite "* ]] || others+=(--test "$suite")
done
end_to_end() {
    cargo test -p cella-tests --locked --no-fail-fast "$@" -- --nocapture --test-threads=1
}
cargo test -p cella-tests --locked --no-run
end_to_end "${on_kvm[@]/#/--test=}" >"$beside" 2>&1 &
end_to_end "${others[@]}" 2>&1 | tee -a "$log"
suites=$((suites + PIPESTATUS[0]))
wait $!
suites=$((suites + $?))
tee -a "$log" <"$beside"

passed=$(awk '/^test result:/ { n += $4 } END { print n + 0 }' "$log")
failed=$(awk '/^test result:/ { n += $6 } END { print n + 0 }' "$log")
mapfile -t skipped < <(grep -o 'SKIPPED: .*' "$log" | sort | uniq -c | sed 's/^ *//')
if [ ${#skipped[@]} -gt 0 ]; then
    echo "Skipped on this machine:"
    printf '  %s\n' "${skipped[@]}"
fi
# A suite that does not build, or lint that complains, is a failure that no test counted.
if [ "$failed" -eq 0 ] && { [ "$lint" -ne 0 ] || [ "$suites" -ne 0 ]; }; then
    failed=1
fi
echo "$passed passed, $failed failed, ${#skipped[@]} skipped"
[ "$failed" -eq 0 ]
