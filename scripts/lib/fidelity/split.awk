# Takes what scripts/in-lab/fidelity prints apart, as it comes: the output of each turn to OUT/TEST.MMU.VMM, its verdict to
# OUT/TEST.MMU.VMM.end (VERDICT SECONDS WHY), a skipped test's reason to OUT/TEST.MMU.skipped; progress to stderr.
# A test's own lines begin with "| ", so that none passes for a mark. Variables: out, mmu, all (how many tests), done (how many before).

{ gsub(/\r/, "") }
/^@@ begin [A-Za-z0-9_.-]+ (qemu|hwvmm)$/ {
    name = $3; vmm = $4; file = out "/" name "." mmu "." vmm
    printf "" >file
    if (vmm == "qemu") { done++; line = sprintf("%s %d/%d %s:", mmu, done, all, name) }
    next
}
/^@@ skip [A-Za-z0-9_.-]+ / {
    text = $0; sub(/^@@ skip [^ ]+ /, "", text)
    skipped = out "/" $3 "." mmu ".skipped"
    print text >skipped; close(skipped)
    done++
    printf "%s %d/%d %s: skipped, %s\n", mmu, done, all, $3, text >"/dev/stderr"
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
