# Results of checks, in one form for every script: a line for each check, and a last line with the counts.
# POSIX sh: sourced by bash on the host and by busybox' shell in the lab and in guests.
#
#   . results.sh
#   results_begin "devices pci: "          # what each line starts with; may be left out
#   check "a name" COMMAND...              # passed where COMMAND succeeds; shows what COMMAND printed where it fails
#   verdict "a name" STATUS [WHY]          # passed where STATUS is 0
#   hold "what" VALUE BOUND                # passed where VALUE is a number not above BOUND
#   ok "a name"; failed "a name" WHY; skipped "a name" WHY
#   flaky "a name" WHY                     # passed, but only when it was tried again
#   results_end                            # "N passed, N failed, N skipped"; returns 0 where nothing failed
#
# scripts/test adds up the last lines, and repeats the lines of checks that were skipped or flaky.
# shellcheck shell=dash

results_begin() {
    results_prefix=$1
    results_passed=0
    results_failed=0
    results_skipped=0
}
results_begin ''

ok() {
    results_passed=$((results_passed + 1))
    printf '%sok      %s\n' "$results_prefix" "$1"
}

failed() {
    results_failed=$((results_failed + 1))
    printf '%sFAILED  %s%s\n' "$results_prefix" "$1" "${2:+: $2}"
}

skipped() {
    results_skipped=$((results_skipped + 1))
    printf '%sskipped %s%s\n' "$results_prefix" "$1" "${2:+: $2}"
}

flaky() {
    results_passed=$((results_passed + 1))
    printf '%sflaky   %s%s\n' "$results_prefix" "$1" "${2:+: $2}"
}

verdict() {
    if [ "$2" = 0 ]; then ok "$1"; else failed "$1" "${3:-status $2}"; fi
}

check() {
    results_name=$1
    shift
    if results_output=$("$@" 2>&1); then ok "$results_name"; else failed "$results_name" "${results_output:-no output}"; fi
}

hold() {
    if awk -v value="$2" -v bound="$3" 'BEGIN { exit !(value ~ /^-?[0-9.]+$/ && value + 0 <= bound + 0) }'; then
        ok "$1: $2 (at most $3)"
    else
        failed "$1" "${2:-nothing} (at most $3)"
    fi
}

# results_add PASSED FAILED [SKIPPED]: adds what another program counted.
results_add() {
    results_passed=$((results_passed + $1))
    results_failed=$((results_failed + $2))
    results_skipped=$((results_skipped + ${3:-0}))
}

results_end() {
    echo "$results_passed passed, $results_failed failed, $results_skipped skipped"
    [ "$results_failed" = 0 ]
}
