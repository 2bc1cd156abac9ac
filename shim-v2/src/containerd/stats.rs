//! A container's stats as containerd's message for a cgroup v2.
//!
//! Called by `service` by way of `convert`. Every field that the guest's cgroup has a number for is
//! filled; those left at nought are of what the guest can't have (rdma) or is not told (pressure,
//! bursts, interfaces, which are the pod's).

use containerd_shim_protos::cgroups_v2::metrics as cgroups;
use kata_like_failure::Failure;
use kata_like_proxy::Stats;
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;

use super::convert;

/// A container's stats, as those of a cgroup v2.
pub fn any(stats: &Stats) -> Result<Any, Failure> {
    let io = stats.io.iter().map(|device| cgroups::IOEntry {
        major: device.major,
        minor: device.minor,
        rbytes: device.read_bytes,
        wbytes: device.written_bytes,
        rios: device.reads,
        wios: device.writes,
        ..Default::default()
    });
    let huge_pages = stats.huge_pages.iter().map(|pages| cgroups::HugeTlbStat {
        current: pages.current,
        max: pages.max,
        pagesize: pages.size.clone(),
        failcnt: pages.failures,
        ..Default::default()
    });
    let metrics = cgroups::Metrics {
        pids: MessageField::some(cgroups::PidsStat {
            current: stats.pids_current,
            limit: stats.pids_limit,
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(stats)),
        memory: MessageField::some(memory(stats)),
        io: MessageField::some(cgroups::IOStat {
            usage: io.collect(),
            ..Default::default()
        }),
        hugetlb: huge_pages.collect(),
        memory_events: MessageField::some(events(stats)),
        ..Default::default()
    };
    convert::any("io.containerd.cgroups.v2.Metrics", &metrics)
}

fn cpu(stats: &Stats) -> cgroups::CPUStat {
    let of = |key: &str| stats.cpu_stat.get(key).copied().unwrap_or_default();
    cgroups::CPUStat {
        usage_usec: of("usage_usec"),
        user_usec: of("user_usec"),
        system_usec: of("system_usec"),
        nr_periods: of("nr_periods"),
        nr_throttled: of("nr_throttled"),
        throttled_usec: of("throttled_usec"),
        ..Default::default()
    }
}

fn memory(stats: &Stats) -> cgroups::MemoryStat {
    let of = |key: &str| stats.memory_stat.get(key).copied().unwrap_or_default();
    cgroups::MemoryStat {
        anon: of("anon"),
        file: of("file"),
        kernel_stack: of("kernel_stack"),
        slab: of("slab"),
        sock: of("sock"),
        shmem: of("shmem"),
        file_mapped: of("file_mapped"),
        file_dirty: of("file_dirty"),
        file_writeback: of("file_writeback"),
        anon_thp: of("anon_thp"),
        inactive_anon: of("inactive_anon"),
        active_anon: of("active_anon"),
        inactive_file: of("inactive_file"),
        active_file: of("active_file"),
        unevictable: of("unevictable"),
        slab_reclaimable: of("slab_reclaimable"),
        slab_unreclaimable: of("slab_unreclaimable"),
        pgfault: of("pgfault"),
        pgmajfault: of("pgmajfault"),
        // One figure up to Linux 5.8, two since.
        workingset_refault: of("workingset_refault_anon")
            .saturating_add(of("workingset_refault_file")),
        workingset_activate: of("workingset_activate_anon")
            .saturating_add(of("workingset_activate_file")),
        workingset_nodereclaim: of("workingset_nodereclaim"),
        pgrefill: of("pgrefill"),
        pgscan: of("pgscan"),
        pgsteal: of("pgsteal"),
        pgactivate: of("pgactivate"),
        pgdeactivate: of("pgdeactivate"),
        pglazyfree: of("pglazyfree"),
        pglazyfreed: of("pglazyfreed"),
        thp_fault_alloc: of("thp_fault_alloc"),
        thp_collapse_alloc: of("thp_collapse_alloc"),
        usage: stats.memory_usage,
        usage_limit: stats.memory_limit,
        max_usage: stats.memory_peak,
        swap_usage: stats.swap_usage,
        swap_limit: stats.swap_limit,
        swap_max_usage: stats.swap_peak,
        ..Default::default()
    }
}

fn events(stats: &Stats) -> cgroups::MemoryEvents {
    let of = |key: &str| stats.memory_events.get(key).copied().unwrap_or_default();
    cgroups::MemoryEvents {
        low: of("low"),
        high: of("high"),
        max: of("max"),
        oom: of("oom"),
        oom_kill: of("oom_kill"),
        oom_group_kill: of("oom_group_kill"),
        ..Default::default()
    }
}
