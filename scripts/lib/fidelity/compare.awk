# Compares a test's turns: awk -f compare.awk QEMU.end QEMU HWVMM.end HWVMM. A line for what differs, then "@@ PASSED FAILED SKIPPED".
# A check that QEMU passes must pass under hwvmm. Figures in a line (addresses, cycles) may differ; how often it comes may not.
# Variables: test, mmu.

FNR == 1 { while (FILENAME != ARGV[turn]) turn++ }
turn % 2 == 1 { verdict[turn] = $1; seconds[turn] = $2; why[turn] = $0; sub(/^[^ ]+ [^ ]+ ?/, "", why[turn]); next }
match($0, /(PASS|FAIL|SKIP): /) {
    word = substr($0, RSTART, 4); text = substr($0, RSTART + 6)
    gsub(/0x[0-9a-fA-F]+|[0-9]+/, "#", text)
    count[turn, word, text]++
    if (!(text in known)) { known[text] = 1; order[++n] = text }
}

function finish(result, text) {
    if (result == "skipped") { print "skipped " mmu " " test ": " text; print "@@ 0 0 1" }
    else { print "FAILED  " mmu " " test ": " text; print "@@ 0 1 0" }
    exit
}

END {
    qemu = verdict[1]; hwvmm = verdict[3]
    for (i = 1; i <= n; i++) there_all += count[2, "PASS", order[i]]
    if (qemu == "") finish("skipped", "the lab ended under QEMU, twice")
    if (qemu == "error") finish("skipped", "QEMU did not run it: " why[1])
    if (qemu == "timeout") finish("skipped", "QEMU's time ran out after " seconds[1] " s and " there_all " checks")
    if (qemu == "silent") finish("skipped", "QEMU printed nothing more for 90 s: ended after " seconds[1] " s and " there_all " checks")
    if (qemu == "toolong") finish("skipped", "it printed more results under QEMU than are kept")
    for (i = 1; i <= n; i++) here_all += count[4, "PASS", order[i]]
    if (hwvmm == "") finish("failed", "the lab ended under hwvmm, twice")
    if (hwvmm == "toolong") finish("failed", "it printed more results under hwvmm than are kept; under QEMU it did not")
    if (hwvmm == "error") finish("failed", "hwvmm did not run it: " why[3])
    if (hwvmm == "timeout") finish("failed", "hwvmm's time ran out after " seconds[3] " s and " here_all " of " there_all " checks; QEMU took " seconds[1] " s")
    for (i = 1; i <= n; i++) {
        text = order[i]; there = count[2, "PASS", text] + 0; here = count[4, "PASS", text] + 0
        pass += here < there ? here : there
        if (here <= there) skip += count[2, "FAIL", text] + count[2, "SKIP", text]
        if (here < there) {
            word = count[4, "FAIL", text] ? "fails" : count[4, "SKIP", text] ? "is skipped" : "does not come"
            fail += there - here
            print "FAILED  " mmu " " test ": " text ": passes under QEMU, " word " under hwvmm"
        } else if (here > there) print "better  " mmu " " test ": " text ": passes under hwvmm only"
    }
    if (qemu != "passed") { skip++; print "skipped " mmu " " test ": " qemu " under QEMU, " hwvmm " under hwvmm" }
    else if (hwvmm == "passed") pass++
    else { fail++; print "FAILED  " mmu " " test ": passed under QEMU, " hwvmm " under hwvmm" (why[3] == "" ? "" : ": " why[3]) }
    print "@@", pass + 0, fail + 0, skip + 0
}
