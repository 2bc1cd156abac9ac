//! An update: what it changes of a container's `linux.resources`, and what is written for that.
//!
//! Called by `container/resources.rs`. An update names single fields, but a value that is written
//! may come from several. So we merge the update into what holds, and check and translate the
//! whole. We ignore `devices`, as runc does: containerd sends all of the spec's with each update.

use kata_like_failure::Failure;
use oci_spec::runtime::LinuxResources;
use serde_json::{Map, Value};

use super::limits::Limits;

/// Files whose values take memory away. They come last, since a kill can't be taken back.
const TAKING: [&str; 2] = ["memory.high", "memory.max"];

/// What an update changes.
#[derive(Debug)]
pub struct Change {
    /// All resources that hold after it.
    pub resources: Value,
    /// The limits that change.
    pub limits: Limits,
    /// The update is refused while this much memory or more is in use, in bytes.
    pub only_below: Option<u64>,
}

impl Change {
    /// Merges the JSON of an `UpdateRequest` into the resources that hold now.
    pub fn of(now: &Value, update: &[u8]) -> Result<Self, Failure> {
        let failed = |error| Failure::bad("resources", format!("no OCI resources: {error}"));
        let mut update: Value = serde_json::from_slice(update).map_err(failed)?;
        let Some(object) = update.as_object_mut() else {
            return Err(Failure::bad("resources", "not an object"));
        };
        object.remove("devices");
        lift_swap_with_memory(object);
        let mut resources = now.clone();
        merge(&mut resources, &update);
        let parsed: LinuxResources = serde_json::from_value(resources.clone()).map_err(failed)?;
        let mut limits = Limits::of(&parsed)?;
        let given = fields(&update);
        limits
            .0
            .retain(|setting| setting.fields.iter().any(|field| given.contains(field)));
        limits
            .0
            .sort_by_key(|setting| TAKING.contains(&&*setting.file));
        // Only this update asks for the check, not those that follow.
        let memory = update.get("memory");
        let checked = memory.and_then(|memory| memory.get("checkBeforeUpdate")?.as_bool());
        let most = |field: &str| memory.and_then(|memory| memory.get(field)?.as_u64());
        let bounds = [most("limit"), most("swap")];
        let only_below = bounds
            .into_iter()
            .flatten()
            .filter(|bound| *bound > 0)
            .min();
        Ok(Self {
            resources,
            limits,
            only_below: only_below.filter(|_| checked == Some(true)),
        })
    }
}

/// Lifts the limit of swap with that of memory, unless the update says otherwise.
fn lift_swap_with_memory(update: &mut Map<String, Value>) {
    if let Some(Value::Object(memory)) = update.get_mut("memory")
        && memory.get("limit").and_then(Value::as_i64) == Some(-1)
        && memory.get("swap").is_none_or(Value::is_null)
    {
        memory.insert("swap".into(), Value::from(-1));
    }
}

/// Puts what is in `update` over what is in `now`, object by object.
fn merge(now: &mut Value, update: &Value) {
    match (now, update) {
        (_, Value::Null) => {}
        (Value::Object(now), Value::Object(update)) => {
            for (key, value) in update {
                merge(now.entry(key).or_insert(Value::Null), value);
            }
        }
        (now, update) => *now = update.clone(),
    }
}

/// Lists the names of the fields that `update` holds, as [`Limits`] has them.
fn fields(update: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for (group, value) in update.as_object().into_iter().flatten() {
        match value {
            Value::Object(fields) => {
                let set = fields.iter().filter(|(_, value)| !value.is_null());
                found.extend(set.map(|(field, _)| match group.as_str() {
                    "unified" => format!("unified[{field}]"),
                    group => format!("{group}.{field}"),
                }));
            }
            Value::Array(entries) => {
                let sizes = entries
                    .iter()
                    .filter_map(|entry| entry.get("pageSize")?.as_str());
                found.extend(sizes.map(|size| format!("{group}[{size}]")));
            }
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn change(now: Value, update: Value) -> Result<Change, Failure> {
        Change::of(&now, update.to_string().as_bytes())
    }

    fn lines(now: Value, update: Value) -> Vec<String> {
        let limits = change(now, update).unwrap().limits;
        let line =
            |setting: &super::super::limits::Setting| format!("{}={}", setting.file, setting.value);
        limits.0.iter().map(line).collect()
    }

    #[test]
    fn only_what_the_update_names_is_written() {
        let now = json!({
            "cpu": {"shares": 512, "quota": 20000, "period": 50000},
            "memory": {"limit": 1000, "swap": 3000, "reservation": 10},
            "pids": {"limit": 5},
            "unified": {"memory.high": "7"},
        });
        let lines = |update| lines(now.clone(), update);
        assert_eq!(lines(json!({})), [""; 0]);
        assert_eq!(
            lines(json!({"cpu": {"quota": 10000}})),
            ["cpu.max=10000 50000"]
        );
        assert_eq!(
            lines(json!({"memory": {"limit": 2000}})),
            ["memory.swap.max=1000", "memory.max=2000"]
        );
        assert_eq!(lines(json!({"pids": {"limit": -1}})), ["pids.max=max"]);
        assert_eq!(
            lines(json!({"unified": {"memory.low": "1"}, "memory": null, "cpu": {"shares": null}})),
            ["memory.low=1"]
        );
        assert_eq!(
            lines(json!({"memory": {"limit": -1}})),
            ["memory.swap.max=max", "memory.max=max"]
        );
    }

    #[test]
    fn what_takes_memory_comes_last() {
        let update = json!({
            "memory": {"limit": 1, "reservation": 1},
            "unified": {"memory.high": "1", "pids.max": "1"},
        });
        assert_eq!(
            lines(json!({}), update),
            [
                "memory.low=1",
                "pids.max=1",
                "memory.max=1",
                "memory.high=1"
            ]
        );
    }

    #[test]
    fn an_update_is_checked_together_with_what_holds() {
        let now = || json!({"memory": {"limit": 1000, "swap": 2000}});
        let error = change(now(), json!({"memory": {"limit": 3000}})).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("linux.resources.memory.swap: "),
            "{error}"
        );
        for (update, field) in [
            (json!({"blockIO": {"weight": 100}}), "blockIO"),
            (
                json!({"cpu": {"realtimeRuntime": 1}}),
                "cpu.realtimeRuntime",
            ),
            (json!({"rdma": {"x": {}}}), "rdma"),
        ] {
            let error = change(now(), update).unwrap_err();
            let start = format!("linux.resources.{field} is not supported");
            assert!(error.to_string().starts_with(&start), "{error}");
        }
        for text in [
            "",
            "[]",
            "1",
            "{\"cpu\": 1}",
            "{\"cpu\": {\"quota\": \"x\"}}",
        ] {
            assert!(Change::of(&now(), text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn an_update_holds_for_those_that_follow() {
        let first = change(json!({}), json!({"cpu": {"period": 50000}})).unwrap();
        assert_eq!(
            lines(first.resources, json!({"cpu": {"quota": 1000}})),
            ["cpu.max=1000 50000"]
        );
    }

    #[test]
    fn devices_are_left_alone() {
        let change = change(json!({}), json!({"devices": [{"allow": true}]})).unwrap();
        assert_eq!(change.limits, Limits::default());
        assert_eq!(change.resources, json!({}));
    }

    #[test]
    fn memory_in_use_is_asked_for_only_on_demand() {
        let below = |memory: Value| {
            let change = change(json!({}), json!({ "memory": memory })).unwrap();
            change.only_below
        };
        assert_eq!(below(json!({"limit": 5})), None);
        assert_eq!(below(json!({"limit": -1, "checkBeforeUpdate": true})), None);
        let both = json!({"limit": 5, "swap": 9, "checkBeforeUpdate": true});
        assert_eq!(below(both), Some(5));
    }
}
