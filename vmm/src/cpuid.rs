//! The guest's CPUID: what KVM supports, without nested virtualisation and the host's performance
//! counters, and with a topology of one package in which each vCPU is a core.
//!
//! Called by `machine` for each vCPU. Facts: Intel SDM vol. 2 CPUID, AMD APM vol. 3 appendix E,
//! Linux Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const VMX: u32 = 1 << 5; // leaf 1, ecx
const TSC_DEADLINE: u32 = 1 << 24; // leaf 1, ecx
const HYPERVISOR: u32 = 1 << 31; // leaf 1, ecx
const RDRAND: u32 = 1 << 30; // leaf 1, ecx
const HYPERTHREADING: u32 = 1 << 28; // leaf 1, edx: more than one logical CPU per package
const SVM: u32 = 1 << 2; // leaf 0x8000_0001, ecx
const CMP_LEGACY: u32 = 1 << 1; // leaf 0x8000_0001, ecx

/// Whether this CPU gives the guest random numbers (RDRAND).
pub fn has_rdrand(supported: &CpuId) -> bool {
    let leaf = supported.as_slice().iter().find(|leaf| leaf.function == 1);
    leaf.is_some_and(|leaf| leaf.ecx & RDRAND != 0)
}

/// The CPUID of vCPU `id` of `count`, made from what KVM supports. `None`: too many entries for
/// KVM.
pub fn for_vcpu(supported: &CpuId, id: u8, count: u8) -> Option<CpuId> {
    let (id, count) = (u32::from(id), u32::from(count));
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f | 0x8000_0026))
        .copied()
        .collect();
    for entry in &mut entries {
        adjust(entry, id, count);
    }
    let deepest = entries.iter().find(|entry| entry.function == 0);
    if deepest.is_some_and(|entry| entry.eax >= 0xb) {
        entries.extend(extended_topology(id, count));
    }
    CpuId::from_entries(&entries).ok()
}

fn adjust(entry: &mut kvm_cpuid_entry2, id: u32, count: u32) {
    match entry.function {
        1 => {
            entry.ecx = entry.ecx & !VMX | TSC_DEADLINE | HYPERVISOR;
            entry.ebx = entry.ebx & 0xffff | count << 16 | id << 24;
            if count > 1 {
                entry.edx |= HYPERTHREADING;
            }
        }
        // Intel's caches: all cores share the third level, each has the others for itself.
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            entry.eax = entry.eax & 0x3fff | sharers(level, count) << 14 | (count - 1) << 26;
        }
        0xa => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => {
            entry.ecx &= !SVM;
            if count > 1 {
                entry.ecx |= CMP_LEGACY;
            }
        }
        0x8000_0008 => entry.ecx = (count - 1) | (id_bits(count) << 12),
        0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 0x7;
            entry.eax = entry.eax & 0x3fff | sharers(level, count) << 14;
        }
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// The number of logical CPUs that share a cache, less one.
fn sharers(level: u32, count: u32) -> u32 {
    if level >= 3 { count - 1 } else { 0 }
}

/// The number of APIC id bits that number the cores.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Leaf 0xb: one thread per core, `count` cores, the x2APIC id.
fn extended_topology(id: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    const SIGNIFICANT_INDEX: u32 = 1; // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let leaf = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: SIGNIFICANT_INDEX,
        eax,
        ebx,
        ecx: kind | index,
        edx: id,
        ..Default::default()
    };
    [
        leaf(0, 0, 1, THREADS),
        leaf(1, id_bits(count), count, CORES),
        leaf(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supported() -> CpuId {
        let leaf = |function, eax, ecx| kvm_cpuid_entry2 {
            function,
            eax,
            ebx: 0x0102_0800,
            ecx,
            ..Default::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0x1f, 0),
            leaf(1, 0, u32::MAX),
            leaf(4, 0x163, 0),
            leaf(0xb, 7, 7),
            leaf(0x8000_0001, 0, u32::MAX),
            leaf(0x8000_000a, 1, 1),
            leaf(0x8000_0026, 7, 7),
        ])
        .unwrap()
    }

    fn find(cpuid: &CpuId, function: u32) -> Vec<kvm_cpuid_entry2> {
        let all = cpuid.as_slice().iter();
        all.filter(|entry| entry.function == function)
            .copied()
            .collect()
    }

    #[test]
    fn the_guest_can_not_nest() {
        let cpuid = for_vcpu(&supported(), 0, 1).unwrap();
        assert_eq!(find(&cpuid, 1)[0].ecx & VMX, 0);
        assert_eq!(find(&cpuid, 0x8000_0001)[0].ecx & SVM, 0);
        assert_eq!(find(&cpuid, 0x8000_000a)[0].eax, 0);
        assert_ne!(find(&cpuid, 1)[0].ecx & HYPERVISOR, 0);
    }

    #[test]
    fn each_vcpu_is_a_core_of_one_package() {
        for id in 0..3 {
            let cpuid = for_vcpu(&supported(), id, 3).unwrap();
            assert_eq!(find(&cpuid, 1)[0].ebx >> 24, u32::from(id));
            let topology = find(&cpuid, 0xb);
            assert_eq!(topology.len(), 3);
            assert!(topology.iter().all(|leaf| leaf.edx == u32::from(id)));
            assert_eq!((topology[1].eax, topology[1].ebx), (2, 3));
            // AMD's own leaf for the topology has the host's values, and newer kernels ask it
            // first.
            assert!(find(&cpuid, 0x8000_0026).is_empty());
        }
    }

    /// APIC ids are the vCPUs' numbers; more than eight need four bits, more than sixteen five.
    #[test]
    fn many_vcpus_fit_their_fields() {
        for (count, bits) in [(1, 0), (2, 1), (8, 3), (10, 4), (17, 5), (32, 5)] {
            let cpuid = for_vcpu(&supported(), count - 1, count).unwrap();
            let topology = find(&cpuid, 0xb);
            let fields = (topology[1].eax, topology[1].ebx, topology[1].edx);
            assert_eq!(fields, (bits, count.into(), u32::from(count) - 1));
            let basic = find(&cpuid, 1)[0];
            assert_eq!(basic.ebx >> 16 & 0xff, u32::from(count));
            assert_eq!(basic.edx & HYPERTHREADING != 0, count > 1);
        }
    }

    #[test]
    fn rdrand_is_seen() {
        assert!(has_rdrand(&supported()));
        assert!(!has_rdrand(&CpuId::new(1).unwrap()));
    }
}
