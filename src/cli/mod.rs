//! The command line: one file a subcommand.

mod bench;
mod clone;
mod ctl;
mod doctor;
mod mmu;
mod nano;
mod output;
mod progress;
mod report;
mod result_file;
mod run;
mod run_results;
mod status_file;
mod test;
mod top;
mod unpack;

use crate::logging;
use clap::{CommandFactory, Parser, Subcommand};
use output::{fail, print_all, say};
use std::process::ExitCode;

const RUN_EXAMPLES: &str = "\
Examples:
  hwvmm run vmlinuz -i initrd.img
  hwvmm run vmlinuz -i initrd.img -m 2G -c 4 --append quiet --stats
  hwvmm run vmlinux --cmdline 'console=ttyS0 root=/dev/vda rw' --timeout 60s --expect 'login: $'
  hwvmm run vmlinuz -i initrd.img --disk root.img --append root=/dev/vda --net tap=tap0 --rng
  hwvmm run debian.qcow2 -m 1G --seed folder-with-user-data --net user
  hwvmm run vmlinuz -i initrd.img --disk a.qcow2,readonly --net user,hostfwd=tcp::2222-:22
  hwvmm run vmlinuz -i initrd.img --profile --profile-out boot.json --budget userspace=400,npf=100
  hwvmm run vmlinuz --profile --tune busy-poll=off,split-irqchip=off
  hwvmm run vmlinuz -- sh -c 'uname -r; exit 7'                        (ends with status 7)
  hwvmm run vmlinuz --rw . --env CI --timeout 5m --status-file s.json -- make test
  hwvmm run vmlinuz --root none --put ./test:/test -- /test
  hwvmm run debian.qcow2 --root debian.qcow2 -- uname -r
  hwvmm run vmlinuz -t -- bash
  hwvmm run vmlinuz --template booted              (boots once, saves the guest, and ends)
  hwvmm run --from booted -- sh -c 'uname -r; exit 7'       (in a copy of it, without a boot)
  hwvmm run vmlinuz -i initrd.img --snapshot-at 'expect=login: $,dir=at-login'    (saves the guest there)
  hwvmm run --tune help                         (lists the levers)
  hwvmm run test.flat --testdev --debug-exit --append 'arguments'
  hwvmm run --config vm.toml
The file has the long names of the options, and a table for each device:
  kernel = \"vmlinuz\"
  memory = \"1G\"
  append = [\"root=/dev/vda\"]
  [[disk]]
  path = \"root.img\"
  readonly = true

A comma in a value of a list is written twice: --disk a,,b.img; behind another comma there must be a key.
An = is written as it is: --disk path=a=b.img.
In the file, { escaped = '/tmp/a\\xff' } is a path that is not UTF-8.

On a terminal, Ctrl-A x ends the run; Ctrl-A Ctrl-A sends one Ctrl-A.

Exit status:
  0    the guest powered off or halted, a line matched --expect, `hwvmm ctl SOCKET stop`, or the guest was
       saved (--template, --snapshot-at)
  2    wrong option or --config file
  32   the guest reset itself           33   triple fault
  34   the guest panicked               35   all vCPUs halted with interrupts off
  36   the guest's watchdog ran out     37   KVM cannot run the guest further
  38   it ended before --expect or --snapshot-at
  39   more exits than --budget allows
  40   the machine's process crashed    41   the guest has no status for the command
  42   hwvmm failed
  124  --timeout, --boot-timeout        130  Ctrl-A x
  128+N  ended by signal N
  With a COMMAND, its exit status; 128+N for a signal N; 127 where it is not found, 126 where it cannot be executed.
--status-file tells its statuses from those above.
With --debug-exit, a write of V to port 0xf4 ends with status V*2+1 (its low 8 bits), an odd one:
  2, 40, 42 and 124 are never the guest's.
After a failure of the guest, and on SIGQUIT, the last exits of each vCPU are printed.";

const REPORT_EXAMPLES: &str = "\
Examples:
  hwvmm report boot.json
  hwvmm report boot.json --format html -o boot.html
  hwvmm report yesterday.json today.json
  hwvmm report today.json --budget-from yesterday.json --slack 2%

Exit status: 0; 1 if a file cannot be read or written; 2 for a wrong option; 39 if a budget is exceeded.";

const TEST_EXAMPLES: &str = "\
Examples:
  hwvmm test --init                              (writes hwvmm-test.toml, a sample)
  hwvmm test
  hwvmm test tests/boots/*.toml --filter debian --jobs 4 --fail-fast
  hwvmm test --regex 'cpus=[24]' --list
  hwvmm test --baseline exits.json --update-baseline
  hwvmm test --baseline exits.json
  hwvmm test --shard 2/5 --output shard-2
  hwvmm test merge shard-1 shard-2 shard-3 shard-4 shard-5
  hwvmm test --format ktap

Each test is a run of its own. The folder of the results has results.jsonl, junit.xml, results.ktap and index.html, and of each try
of a test console.log, hwvmm.log, stats.json, run.toml and again.sh.

Verdicts:
  pass, skip, flaky (passed on a retry)
  fail            the run ended in another way than the test wants, or a sub-test failed
  panic, oops     by the kernel's log; `fail-on` says which complaints fail a test
  hang, time-out  no output for the time of `silence`; the time of `timeout` passed, or that of `boot-timeout`
                  before the guest had booted
  triple-fault, over-budget
  infrastructure  hwvmm or the host failed: run it again

Exit status:
  0    all tests are good: pass, skip or flaky
  1    a test is not
  2    wrong option or suite
  42   hwvmm or the host failed, and no test is bad; or tests of a merge are missing
  130  ended by SIGINT, SIGTERM, SIGHUP or SIGQUIT";

const STATUSES: &str = "\
Exit status: 0; 1 for a failure; 2 for a wrong option or subcommand. `run` and `test` have statuses of their own, and `report` and
`doctor` say what 1 and others mean: see their --help.";

/// The statuses of a subcommand that has no others.
const PLAIN_STATUS: &str = "Exit status: 0; 1 for a failure; 2 for a wrong option.";

/// Boots Linux guests under KVM, and shows what causes their VM exits
#[derive(Parser)]
#[command(name = "hwvmm", version, max_term_width = 100, arg_required_else_help = true, after_help = STATUSES)]
struct Cli {
    /// Print more on stderr: -v each step, -vv details
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

// The options of a subcommand are only made where it is called, which takes a third of the time of a start. A doc comment on
// their struct, or on one within it, then replaces the one here in its help, unless it says `about`.
#[derive(Subcommand)]
#[command(defer = true)]
enum Command {
    /// Boot a guest
    #[command(after_help = RUN_EXAMPLES, args_override_self = true)]
    Run(Box<run::Args>),
    /// Run suites of boot tests
    #[command(after_help = TEST_EXAMPLES)]
    Test(Box<test::Args>),
    /// Check whether this host can run Linux guests under KVM
    #[command(after_help = "Exit status: 0 if Linux guests can run here, 1 if not.")]
    Doctor(doctor::Args),
    /// Print a profile in one of many formats, compare two profiles, check one against a budget
    #[command(after_help = REPORT_EXAMPLES)]
    Report(report::Args),
    /// Show the exits of a running machine, live
    #[command(
        after_help = "Examples:\n  hwvmm run vmlinuz --api /tmp/vm.sock ...\n  hwvmm top /tmp/vm.sock\n  hwvmm top --once /tmp/vm.sock\n\nExit status: 0, also \
                            where the machine ends meanwhile; 1 where no machine answers; 2 for a wrong option."
    )]
    Top(top::Args),
    /// Measure the cost of exits on this host
    #[command(after_help = PLAIN_STATUS)]
    Bench(bench::Args),
    /// Show or set the MMU of KVM on this host: nested or shadow paging
    #[command(
        after_help = "Examples:\n  hwvmm mmu\n  sudo hwvmm mmu set shadow && hwvmm run vmlinuz --mmu shadow --profile\n\nThe \
                            MMU is a parameter of KVM's module, for all machines of the host. `set` loads the module again, \
                            with the parameters of /etc/modprobe.d.\n\nExit status: 0; 1 where it cannot be known or set; 2 for \
                            a wrong option."
    )]
    Mmu(mmu::Args),
    /// Control a running machine: show its state and exits, set its balloon, pause, save or end it
    #[command(
        after_help = "Examples:\n  hwvmm run vmlinuz --balloon --api /tmp/vm.sock ...\n  hwvmm ctl /tmp/vm.sock status\n  \
                            hwvmm ctl /tmp/vm.sock balloon 100M\n\nThe response is one line of JSON. Exit status: 0, or 1 where \
                            no machine answers or it refuses."
    )]
    Ctl(ctl::Args),
    /// Run many clones of a snapshot at once
    #[command(after_help = clone::AFTER_HELP)]
    Clone(clone::Args),
    /// Unpack the kernel in a bzImage into an ELF file
    #[command(
        after_help = "Example: hwvmm unpack vmlinuz --output vmlinux\n\nExit status: 0; 1 where the kernel cannot be unpacked; 2 for \
                            a wrong option."
    )]
    Unpack(unpack::Args),
    /// Print a completion script for a shell
    #[command(
        after_help = "Example: hwvmm completions bash > /usr/share/bash-completion/completions/hwvmm\n\nExit status: 0; 1 \
                            for a failure; 2 for a wrong option or shell."
    )]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page of hwvmm, or of a subcommand
    #[command(after_help = "Example: hwvmm man run | man -l -\n\nExit status: 0; 1 for a failure; 2 for a wrong \
                            option or subcommand.")]
    Man {
        /// A subcommand
        subcommand: Option<String>,
    },
}

fn log_level(verbose: u8) -> log::LevelFilter {
    match verbose {
        0 => log::LevelFilter::Warn,
        1 => log::LevelFilter::Info,
        2 => log::LevelFilter::Debug,
        _ => log::LevelFilter::Trace,
    }
}

/// Parses the command line and does what it says.
#[must_use]
pub fn main() -> ExitCode {
    crate::sandbox::note_inherited_files();
    let cli = Cli::parse();
    let _flush = logging::init(log_level(cli.verbose), logging::Sink::Stderr);
    match cli.command {
        Command::Run(args) => run::run(*args),
        Command::Test(args) => test::run(&args),
        Command::Ctl(args) => ctl::run(&args),
        Command::Clone(args) => clone::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Mmu(args) => mmu::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Unpack(args) => unpack::run(&args),
        Command::Completions { shell } => {
            // Made first: the generator panics where it cannot write.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "hwvmm", &mut script);
            print_all(&script)
        }
        Command::Man { subcommand } => man(subcommand.as_deref()),
    }
}

fn man(subcommand: Option<&str>) -> ExitCode {
    let mut command = Cli::command();
    command.build();
    let names = command.get_subcommands().map(clap::Command::get_name).collect::<Vec<_>>().join(", ");
    let page = match subcommand {
        None => Some(command),
        Some(name) => command.find_subcommand(name).cloned().map(|found| found.display_name(format!("hwvmm-{name}"))),
    };
    let Some(page) = page else {
        say(&format!("there is no subcommand '{}'; the subcommands are: {names}", subcommand.unwrap_or_default()));
        return ExitCode::from(crate::exit::end::status::USAGE);
    };
    let mut text = Vec::new();
    match clap_mangen::Man::new(page).render(&mut text) {
        Ok(()) => print_all(&text),
        Err(error) => fail(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_subcommand_is_described_in_its_own_help_as_in_the_list() {
        let abouts = |command: &clap::Command| -> Vec<_> {
            command.get_subcommands().map(|each| (each.get_name().to_owned(), each.get_about().cloned())).collect()
        };
        let mut command = Cli::command();
        let listed = abouts(&command);
        command.build();
        assert!(listed.iter().all(|(_, about)| about.is_some()), "{listed:?}");
        assert_eq!(abouts(&command)[..listed.len()], listed[..]);
    }

    #[test]
    fn every_help_says_what_the_exit_statuses_are() {
        fn says(command: &clap::Command) -> bool {
            command.get_after_help().is_some_and(|text| text.to_string().contains("Exit status:"))
        }
        let mut command = Cli::command();
        command.build();
        assert!(says(&command));
        for each in command.get_subcommands().filter(|each| each.get_name() != "help") {
            assert!(says(each), "{}", each.get_name());
        }
        let test = command.find_subcommand("test").expect("test");
        assert!(test.find_subcommand("merge").is_some_and(says), "it has others than `test`");
    }

    #[test]
    fn the_default_command_line_in_the_help_is_the_real_one() {
        let mut command = Cli::command();
        let help = command.find_subcommand_mut("run").expect("run").render_long_help().to_string();
        assert!(help.contains("pci=conf1,noearly 8250.nr_uarts=1 reboot=f"));
    }
}
