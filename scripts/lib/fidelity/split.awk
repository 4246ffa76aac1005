# Takes what scripts/in-lab/fidelity prints apart, as it comes: the output of each turn to OUT/TEST.MMU.VMM, its verdict to
# OUT/TEST.MMU.VMM.end (VERDICT SECONDS WHY), a skipped test's reason to OUT/TEST.MMU.skipped; progress to stderr.
# A test's own lines begin with "| ", so that none passes for a mark. Variables: out, mmu, all (how many tests in all labs). How many
# are through is counted in OUT/MMU.progress, a line a test, since labs that run at once share it.

# "MMU N/ALL": the test's place among those that were begun, in all labs.
function place(test, progress, line, n, known) {
    progress = out "/" mmu ".progress"
    while ((getline line <progress) > 0) { n++; if (line == test) known = n }
    close(progress)
    if (!known) { known = n + 1; print test >>progress; close(progress) }
    return mmu " " known "/" all
}

{ gsub(/\r/, "") }
/^@@ begin [A-Za-z0-9_.-]+ (qemu|hwvmm)$/ {
    name = $3; vmm = $4; file = out "/" name "." mmu "." vmm
    printf "" >file
    if (vmm == "qemu") line = sprintf("%s %s:", place(name), name)
    next
}
/^@@ skip [A-Za-z0-9_.-]+ / {
    text = $0; sub(/^@@ skip [^ ]+ /, "", text)
    skipped = out "/" $3 "." mmu ".skipped"
    print text >skipped; close(skipped)
    printf "%s %s: skipped, %s\n", place($3), $3, text >"/dev/stderr"
    next
}
/^@@ end [a-z]+ [0-9]+/ {
    if (file == "") next
    print substr($0, 8) >(file ".end"); close(file ".end"); close(file)
    line = line " " vmm " " $3 " " $4 " s" (vmm == "qemu" && $3 !~ /^(timeout|silent|toolong|error)$/ ? "," : "")
    if (line !~ /,$/) print line >"/dev/stderr"
    file = ""
    next
}
file != "" && /^\| / { print substr($0, 3) >file }
