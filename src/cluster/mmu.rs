//! Translates linear addresses by the guest's page tables, and keeps the translations of one cluster.
//!
//! Only what succeeds without any effect is translated: supervisor pages that are present at every level, with the accessed bits (for
//! a write the dirty bit) set already, in guest memory. The processor may keep translations until the guest flushes them (SDM vol. 3A
//! §4.10); instructions that flush end a cluster, and so do translations kept here.

use crate::measure::clusters::ClusterEnd as End;
use crate::memory::{GuestPage, GuestRam};

/// Translations kept at most, of data and of code each; powers of two. A path through the kernel has a few dozen pages of code.
const DATA_ENTRIES: usize = 256;
const CODE_ENTRIES: usize = 64;
/// Translations of data kept aside where two pages that are used in turn have the same place.
const ASIDE: usize = 8;
/// The tag of an entry that has no translation: no linear address has this page number.
const EMPTY: u64 = u64::MAX;

// Bits of page-table entries (SDM vol. 3A §4.5).
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    Execute,
}

/// How linear addresses are translated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Paging {
    /// The gpa of the top page table.
    pub(super) root: u64,
    /// 4 or 5.
    pub(super) levels: u32,
    /// EFER.NXE.
    pub(super) no_execute: bool,
}

#[derive(Clone, Copy)]
struct Entry<'a> {
    /// The page number of the linear address.
    tag: u64,
    /// The same where the page may be written to, else [`EMPTY`].
    writable: u64,
    page: Option<GuestPage<'a>>,
    /// The page's gpa.
    gpa: u64,
}

/// The translations of one cluster.
pub(super) struct Mmu<'a> {
    ram: &'a GuestRam,
    paging: Paging,
    data: [Entry<'a>; DATA_ENTRIES],
    code: [Entry<'a>; CODE_ENTRIES],
    /// The translations of data that others have taken the place of last.
    aside: [Entry<'a>; ASIDE],
    /// The next of them to be replaced.
    next_aside: usize,
    /// A bit for the hash of each page that code was read from, or that was written to: which pages may be both.
    code_pages: u64,
    written_pages: u64,
    /// A translation of code has been replaced.
    forgotten: bool,
    /// Walks of the guest's page tables.
    walks: u64,
}

/// The bit of a page in a set of pages by hash.
fn bit(gpa: u64) -> u64 {
    1 << (gpa >> 12 & 63)
}

#[allow(clippy::cast_possible_truncation, reason = "an index is masked to its table's size")]
impl<'a> Mmu<'a> {
    pub(super) fn new(ram: &'a GuestRam, paging: Paging) -> Self {
        let empty = Entry { tag: EMPTY, writable: EMPTY, page: None, gpa: 0 };
        let (data, code) = ([empty; DATA_ENTRIES], [empty; CODE_ENTRIES]);
        let aside = [empty; ASIDE];
        Self {
            ram,
            paging,
            data,
            code,
            aside,
            next_aside: 0,
            code_pages: 0,
            written_pages: 0,
            forgotten: false,
            walks: 0,
        }
    }

    /// How often the guest's page tables were walked.
    pub(super) fn walks(&self) -> u64 {
        self.walks
    }

    /// Returns true if since the last call a page has been forgotten from which code was read: a write to it ends no cluster.
    #[inline]
    pub(super) fn has_forgotten_code(&mut self) -> bool {
        std::mem::take(&mut self.forgotten)
    }

    /// Reads as [`Self::load`] where the translation is kept already; else `None`.
    #[inline]
    pub(super) fn load_kept(&self, address: u64, width: u8) -> Option<u64> {
        let entry = &self.data[(address >> 12) as usize % DATA_ENTRIES];
        if entry.tag == address >> 12 { entry.page?.load(address & 0xfff, width) } else { None }
    }

    /// As [`Self::writable`] where the translation is kept already; else `None`.
    #[inline]
    pub(super) fn writable_kept(&self, address: u64) -> Option<GuestPage<'a>> {
        let entry = &self.data[(address >> 12) as usize % DATA_ENTRIES];
        if entry.writable == address >> 12 { entry.page } else { None }
    }

    /// Writes as [`Self::store`] where the translation is kept already; else `None`, and nothing is written.
    #[inline]
    pub(super) fn store_kept(&self, address: u64, width: u8, value: u64) -> Option<()> {
        self.writable_kept(address)?.store(address & 0xfff, width, value)
    }

    /// Reads `1 << width` bytes at a linear address.
    #[inline]
    pub(super) fn load(&mut self, address: u64, width: u8) -> Result<u64, End> {
        let entry = &self.data[(address >> 12) as usize % DATA_ENTRIES];
        let page = if entry.tag == address >> 12 { entry.page } else { None };
        let page = match page {
            Some(page) => page,
            None => self.fill(address, Access::Read)?,
        };
        page.load(address & 0xfff, width).ok_or(End::Unaligned)
    }

    /// Writes the lower `1 << width` bytes of `value` at a linear address.
    #[inline]
    pub(super) fn store(&mut self, address: u64, width: u8, value: u64) -> Result<(), End> {
        self.writable(address)?.store(address & 0xfff, width, value).ok_or(End::Unaligned)
    }

    /// Returns the page of a linear address to which the guest may write, and which holds no code of this cluster.
    #[inline]
    pub(super) fn writable(&mut self, address: u64) -> Result<GuestPage<'a>, End> {
        let entry = &self.data[(address >> 12) as usize % DATA_ENTRIES];
        if let Some(page) = entry.page
            && entry.writable == address >> 12
        {
            return Ok(page);
        }
        self.fill(address, Access::Write)
    }

    /// Returns the page of the code at a linear address, and its gpa. While its translation is kept, a write to it ends the cluster.
    #[inline]
    pub(super) fn code(&mut self, address: u64) -> Result<(GuestPage<'a>, u64), End> {
        let entry = &self.code[(address >> 12) as usize % CODE_ENTRIES];
        if let Some(page) = entry.page
            && entry.tag == address >> 12
        {
            return Ok((page, entry.gpa));
        }
        self.fill_code(address)
    }

    #[cold]
    fn fill_code(&mut self, address: u64) -> Result<(GuestPage<'a>, u64), End> {
        let gpa = self.walk(address, Access::Execute)?;
        let page = self.ram.page(gpa).ok_or(End::NoMemory)?;
        let entry = &mut self.code[(address >> 12) as usize % CODE_ENTRIES];
        self.forgotten |= entry.tag != EMPTY;
        *entry = Entry { tag: address >> 12, writable: EMPTY, page: Some(page), gpa };
        self.code_pages |= bit(gpa);
        if self.written_pages & bit(gpa) != 0 {
            // Under each of its addresses: the next write finds that it is code now.
            let data = self.data.iter_mut().chain(&mut self.aside);
            data.filter(|entry| entry.gpa == gpa).for_each(|entry| entry.writable = EMPTY);
        }
        Ok((page, gpa))
    }

    #[cold]
    fn fill(&mut self, address: u64, access: Access) -> Result<GuestPage<'a>, End> {
        let tag = address >> 12;
        let place = tag as usize % DATA_ENTRIES;
        let fits = |entry: &&mut Entry<'a>| (if access == Access::Write { entry.writable } else { entry.tag }) == tag;
        if let Some(entry) = self.aside.iter_mut().find(fits)
            && let Some(page) = entry.page
        {
            std::mem::swap(entry, &mut self.data[place]);
            return Ok(page);
        }
        let gpa = self.walk(address, access)?;
        let page = self.ram.page(gpa).ok_or(End::NoMemory)?;
        let mut writable = EMPTY;
        if access == Access::Write {
            writable = tag;
            let is_code = |entry: &Entry<'_>| entry.tag != EMPTY && entry.gpa == gpa;
            if self.code_pages & bit(gpa) != 0 && self.code.iter().any(is_code) {
                return Err(End::OwnCode);
            }
            self.written_pages |= bit(gpa);
        }
        let replaced = std::mem::replace(&mut self.data[place], Entry { tag, writable, page: Some(page), gpa });
        if replaced.tag != tag && replaced.tag != EMPTY {
            self.aside[self.next_aside % ASIDE] = replaced;
            self.next_aside += 1;
        }
        Ok(page)
    }

    /// Returns the gpa of the 4-KiB page at a linear address.
    fn walk(&mut self, address: u64, access: Access) -> Result<u64, End> {
        self.walks += 1;
        let bits = 12 + 9 * self.paging.levels;
        // Canonical: the bits above the translated ones are copies of the highest of them.
        let high = address.cast_signed() >> (bits - 1);
        if high != 0 && high != -1 {
            return Err(End::Page);
        }
        let (mut table, mut user) = (self.paging.root & ADDRESS, true);
        for level in (0..self.paging.levels).rev() {
            let shift = 12 + 9 * level;
            let index = address >> shift & 0x1ff;
            let entry = self.ram.page(table).and_then(|page| page.load(index * 8, 3)).ok_or(End::Page)?;
            let write = access == Access::Write;
            if entry & (PRESENT | ACCESSED) != PRESENT | ACCESSED
                || write && entry & WRITABLE == 0
                || access == Access::Execute && entry & NO_EXECUTE != 0
                || entry & NO_EXECUTE != 0 && !self.paging.no_execute
            {
                return Err(End::Page);
            }
            user &= entry & USER != 0;
            let large = level > 0 && entry & LARGE != 0;
            if level > 0 && !large {
                table = entry & ADDRESS;
                continue;
            }
            // A large page has reserved bits below its address, but for the lowest (PAT).
            let within = (1_u64 << shift) - 1;
            let reserved = if large { within & ADDRESS & !(1 << 12) } else { 0 };
            if level > 2 || user || write && entry & DIRTY == 0 || entry & reserved != 0 {
                return Err(End::Page);
            }
            return Ok(entry & ADDRESS & !within | address & within & ADDRESS);
        }
        Err(End::Page)
    }
}
