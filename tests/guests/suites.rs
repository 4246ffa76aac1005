//! Programs for suites of `hwvmm test`: each comes to another verdict.

// A panic after which the kernel prints nothing more, and stays.
printer!(panic_that_stays, [".ascii \"[    0.5] Kernel panic - not syncing: no init found\\r\\n\\0\""], "5: jmp 5b");
// Two complaints of a kernel that goes on, and powers off.
printer!(
    oops,
    [
        ".ascii \"[    0.5] BUG: kernel NULL pointer dereference, address: 0000000000000008\\n\"",
        ".ascii \"[    0.6][    T1] WARNING: CPU: 0 PID: 1 at a.c:1 f+0x1/0x2\\n\\0\""
    ],
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
);
// A command that exits with 0, one that is not to be run here (4), and one that exits with 0 after a complaint of the kernel.
program!(
    command_ok,
    "mov $0x5e8,%dx",
    "xor %eax,%eax",
    "out %al,%dx",
    "inc %dx",
    "inc %eax",
    "out %al,%dx",
    "5: jmp 5b"
);
program!(
    command_skip,
    "mov $0x5e8,%dx",
    "mov $4,%al",
    "out %al,%dx",
    "inc %dx",
    "mov $1,%al",
    "out %al,%dx",
    "5: jmp 5b"
);
printer!(
    command_oops,
    [".ascii \"[    0.5] BUG: scheduling while atomic: swapper/0/1/0x00000002\\n\\0\""],
    "mov $0x5e8,%dx",
    "xor %eax,%eax",
    "out %al,%dx",
    "inc %dx",
    "inc %eax",
    "out %al,%dx",
    "5: jmp 5b"
);
// KTAP; then the guest powers off.
printer!(
    ktap_pass,
    [".ascii \"KTAP version 1\\n1..2\\nok 1 first\\nok 2 second # SKIP not built in\\n\\0\""],
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
);
printer!(
    ktap_fail,
    [
        ".ascii \"[    0.1] KTAP version 1\\n[    0.1] 1..1\\n[    0.1]     # Subtest: suite\\n[    0.1]     1..3\\n\"",
        ".ascii \"[    0.1]     ok 1 first\\n[    0.1]     not ok 2 second\\n[    0.1]     ok 3 third\\n[    0.1] not ok 1 suite\\n\\0\""
    ],
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
);
printer!(
    ktap_skip,
    [".ascii \"TAP version 13\\n1..0 # SKIP no such device\\n\\0\""],
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
);
// The same as [`ktap_pass`], of a guest that resets itself.
printer!(
    ktap_then_reset,
    [".ascii \"KTAP version 1\\n1..1\\nok 1 first\\n\\0\""],
    "mov $0x602,%dx",
    "mov $1,%al",
    "out %al,%dx",
    "hlt",
);
// What a guest may print to fake the results of others, in text, KTAP, XML and for GitHub. Then it resets itself.
printer!(
    hostile_log,
    [
        ".ascii \"pass              0.00 s        1 exits  off\\n\\033[2J\\033]0;owned\\007\\n::error::fake\\n ::add-mask::x\\n\"",
        ".ascii \"##[error]fake\\n</failure><testcase name=\\\"fake\\\"/>\\n]]>\\001\\010\\n\"",
        ".ascii \"1..2\\nok 1 <b>::error::x | a\\nnot ok 2 ##[error] # ::warning::y\\nok 2 off\\n\\0\""
    ],
    "mov $0x602,%dx",
    "mov $1,%al",
    "out %al,%dx",
    "hlt",
);
// Powers off where its first module begins with a byte that is not 0, and resets itself otherwise.
program!(
    fails_once,
    "mov 24(%ebx),%ecx",
    "mov (%ecx),%esi",
    "mov (%esi),%al",
    "test %al,%al",
    "jz 5f",
    "mov $0x600,%dx",
    "mov $0x34,%al",
    "out %al,%dx",
    "hlt",
    "5: mov $0x602,%dx",
    "mov $1,%al",
    "out %al,%dx",
    "hlt",
);
