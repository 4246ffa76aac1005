# Reads unittests.cfg of kvm-unit-tests. A line for each test that belongs to a default run on x86_64:
#   NAME|FILE|VCPUS|MIB|SECONDS|CHECK|CPU|LEVERS|KEPT|WHY|ARGUMENTS
# SECONDS is the suite's own limit. CHECK: PATH=VALUE pairs, as in the file. CPU: QEMU's -cpu. LEVERS: hwvmm's --tune for the same
# processor. KEPT: features that the test's -cpu takes away, and that both VMMs have all the same, since hwvmm cannot take them away.
# WHY: why the test is not run. A test that is not listed for another reason is named on stderr.
# Variable: only, a regular expression for the names of tests.

function words_of(value) { gsub(/^["'\'']|["'\'']$/, "", value); return value }

function why_not(text) { why = why (why == "" ? "hwvmm has no " : ", ") text }

# The processor. Both VMMs give all features that KVM has, in place of the model and the vendor that the suite names. What -cpu adds is
# among them. What it takes away is taken away from both, or from none.
function processor(value, parts, n, i) {
    n = split(value, parts, ",")
    for (i = 2; i <= n; i++) {
        if (parts[i] ~ /^hv_/) why_not("-cpu " parts[i])
        if (parts[i] == "-x2apic" || parts[i] == "-tsc-deadline") {
            cpu = cpu "," parts[i]
            levers = levers (levers == "" ? "" : ",") substr(parts[i], 2) "=off"
        } else if (parts[i] ~ /^-/) kept = kept (kept == "" ? "" : " ") parts[i]
    }
}

# QEMU's -m: MiB, or with a suffix.
function mib(value) {
    if (value ~ /[gG]$/) return value * 1024
    if (value ~ /[kK]$/) return int(value / 1024)
    return value + 0
}

function parameters(value, parts, n, i) {
    if (match(value, /-append +("[^"]*"|'[^']*'|[^ ]+)/)) {
        words = substr(value, RSTART, RLENGTH)
        value = substr(value, 1, RSTART - 1) " " substr(value, RSTART + RLENGTH)
        sub(/^-append +/, "", words)
        words = words_of(words)
    }
    n = split(value, parts, " ")
    for (i = 1; i <= n; i++) {
        if (parts[i] == "-m") memory = mib(parts[++i])
        else if (parts[i] == "-cpu") processor(parts[++i])
        else if (parts[i] == "-device") why_not("-device " parts[++i])
        else if (parts[i] == "-M" || parts[i] == "-machine") { if (parts[++i] !~ /^(pit=off|vmport=on)$/) why_not("-machine " parts[i]) }
        else if (parts[i] == "-overcommit") why_not("-overcommit " parts[++i])
        else if (parts[i] != "-enable-kvm") why_not(parts[i])
    }
}

function flush(left, what) {
    # They become names of files.
    if (name !~ /^[A-Za-z0-9_.-]*$/ || file !~ /^[A-Za-z0-9_.-]*$/) print "left out: " name " (its name, or the name of its file, has other than letters, digits, _, . and -)" >"/dev/stderr"
    else if (name != "" && file != "" && name ~ only) {
        # Not in hwvmm by design.
        if (file == "s3.flat") why_not("sleep to memory (ACPI S3)")
        what = file "|" smp "|" memory "|" check "|" cpu "|" words
        if (why == "" && kept != "" && (what in first)) why = "hwvmm cannot take away " kept "; with it, this is " first[what] " again"
        left = arch == "i386" ? "i386 only" : groups ~ /(^| )nodefault( |$)/ ? "marked as manual run only" : accel == "tcg" ? "tcg only" : ""
        if (left != "") print "left out: " name " (" left ")" >"/dev/stderr"
        else {
            print name "|" file "|" smp "|" memory "|" seconds "|" check "|" cpu "|" levers "|" kept "|" why "|" words
            if (why == "" && !(what in first)) first[what] = name
        }
    }
    name = file = arch = groups = words = check = levers = kept = why = accel = ""
    cpu = "max"; smp = 1; memory = 256; seconds = 90
}

BEGIN { if (only == "") only = "."; flush() }
{ sub(/\r$/, "") }
/^[ \t]*(#|$)/ { next }
/^\[/ { flush(); name = $0; gsub(/[][]/, "", name); next }
{
    key = $0; sub(/[ \t]*=.*/, "", key)
    value = $0; sub(/^[^=]*=[ \t]*/, "", value)
    if (key == "file") file = value
    else if (key == "smp") smp = value ~ /^[0-9]+$/ ? value : 2
    else if (key == "arch") arch = value
    else if (key == "accel") accel = value
    else if (key == "groups") groups = value
    else if (key == "check") check = value
    else if (key == "timeout" && value ~ /^[0-9]+s?$/) seconds = value + 0
    else if (key == "test_args") words = words_of(value)
    else if (key == "extra_params" || key == "qemu_params") parameters(value)
}
END { flush() }
