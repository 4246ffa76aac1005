//! Hostile multiboot programs: drivers of the first virtio-mmio device that break the rules.

// Resets the device at 0xd0000000, accepts VIRTIO_F_VERSION_1, and gives queue 0 (64 entries) a descriptor table at 0x400000 and
// the other two areas where the first two lines say.
macro_rules! driver {
    ($name:ident, $available:literal, $used:literal, $($line:literal),* $(,)?) => {
        payload!(
            $name, ".code32",
            "mov $0xd0000000,%edi",
            "movl $0,0x70(%edi)", "movl $1,0x70(%edi)", "movl $3,0x70(%edi)",
            "movl $1,0x24(%edi)", "movl $1,0x20(%edi)", "movl $11,0x70(%edi)",
            "movl $0,0x30(%edi)", "movl $64,0x38(%edi)",
            "movl $0x400000,0x80(%edi)", "movl $0,0x84(%edi)",
            $available, "movl $0,0x94(%edi)",
            $used, "movl $0,0xa4(%edi)",
            "movl $1,0x44(%edi)", "movl $15,0x70(%edi)",
            $($line),*
        );
    };
}

// An entropy device: the used ring's index is the available ring's, so that each buffer that is used makes one more available. The
// lines come after a while.
macro_rules! ring_over_its_index {
    ($name:ident, $($line:literal),* $(,)?) => {
        driver!(
            $name, "movl $0x404002,0x90(%edi)", "movl $0x404004,0xa0(%edi)",
            "movl $0x500000,0x400000", "movl $0,0x400004", "movl $8,0x400008",
            "movw $2,0x40000c", "movw $0,0x40000e", "movw $1,0x404004",
            "movl $0,0x50(%edi)",
            "mov $1000000,%ecx", "2: pause", "loop 2b",
            $($line),*
        );
    };
}

// Reports the device status, shifted right by 2 bits: 16 is DEVICE_NEEDS_RESET.
ring_over_its_index!(ring_over_its_index, "mov 0x70(%edi),%eax", "shr $2,%eax", "out %eax,$0xf4", "3: jmp 3b");
// Resets the device while it works, and reports what the status is afterwards.
ring_over_its_index!(
    ring_over_its_index_and_reset,
    "movl $0,0x70(%edi)",
    "mov 0x70(%edi),%eax",
    "add $10,%eax",
    "out %eax,$0xf4",
    "3: jmp 3b",
);
// A disk: writes the first bytes of a qcow2 image to sector 0, and reports 10 and the status of the request.
driver!(
    raw_disk_becomes_qcow2,
    "movl $0x404000,0x90(%edi)",
    "movl $0x408000,0xa0(%edi)",
    "movl $1,0x500000",
    "movl $0,0x500004",
    "movl $0,0x500008",
    "movl $0,0x50000c",
    "movl $0xfb494651,0x510000",
    "movl $0x03000000,0x510004",
    "movl $0x500000,0x400000",
    "movl $16,0x400008",
    "movl $0x00010001,0x40000c",
    "movl $0x510000,0x400010",
    "movl $512,0x400018",
    "movl $0x00020001,0x40001c",
    "movl $0x520000,0x400020",
    "movl $1,0x400028",
    "movl $0x00000002,0x40002c",
    "movw $1,0x404002",
    "movl $0,0x50(%edi)",
    "2: pause",
    "cmpw $1,0x408002",
    "jne 2b",
    "movzbl 0x520000,%eax",
    "add $10,%eax",
    "out %eax,$0xf4",
    "3: jmp 3b",
);
// An entropy device: a chain of more descriptors than the queue has, by an indirect table of 1,000. Reports as the first program.
driver!(
    chain_longer_than_its_queue,
    "movl $0x404000,0x90(%edi)",
    "movl $0x408000,0xa0(%edi)",
    "mov $0x600000,%ebx",
    "mov $1,%ecx",
    "4: movl $0x500000,(%ebx)",
    "movl $0,4(%ebx)",
    "movl $1,8(%ebx)",
    "mov %ecx,%eax",
    "shl $16,%eax",
    "or $3,%eax",
    "mov %eax,12(%ebx)",
    "add $16,%ebx",
    "inc %ecx",
    "cmp $1000,%ecx",
    "jne 4b",
    "movl $0x500000,(%ebx)",
    "movl $0,4(%ebx)",
    "movl $1,8(%ebx)",
    "movl $2,12(%ebx)",
    "movl $0x600000,0x400000",
    "movl $16000,0x400008",
    "movw $4,0x40000c",
    "movw $1,0x404002",
    "movl $0,0x50(%edi)",
    "mov $1000000,%ecx",
    "2: pause",
    "loop 2b",
    "mov 0x70(%edi),%eax",
    "shr $2,%eax",
    "out %eax,$0xf4",
    "3: jmp 3b",
);
