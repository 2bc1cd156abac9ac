//! The spec's hooks: those that run on the host, taken out; those of the guest stay in its part.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::runtime::{Hook, Spec};

use super::parts::bad;
use kata_like_failure::Failure;

/// The most hooks of one kind.
const MAX_HOOKS: usize = 64;

/// A program of the host that runs at a step of a container's life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostHook {
    pub path: PathBuf,
    /// Its arguments, the first being its name.
    pub arguments: Vec<String>,
    /// Its environment; none: the shim's.
    pub environment: Option<Vec<String>>,
    /// How long it may run, if the spec says so.
    pub timeout: Option<Duration>,
}

/// The hooks that run on the host, and what they are told of the container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostHooks {
    /// Before the guest makes the container.
    pub prestart: Vec<HostHook>,
    /// After those, at the same moment.
    pub create_runtime: Vec<HostHook>,
    /// After the container's start.
    pub poststart: Vec<HostHook>,
    /// After its end.
    pub poststop: Vec<HostHook>,
    /// The spec's version.
    pub version: String,
    /// The spec's annotations.
    pub annotations: HashMap<String, String>,
}

impl HostHooks {
    /// The hooks of a spec.
    pub fn of(spec: &Spec) -> Result<Self, Failure> {
        let Some(hooks) = spec.hooks() else {
            return Ok(Self::default());
        };
        #[allow(
            deprecated,
            reason = "nerdctl's and others' hooks are still of that kind"
        )]
        let prestart = hooks.prestart();
        Ok(Self {
            prestart: list("prestart", prestart.as_deref())?,
            create_runtime: list("createRuntime", hooks.create_runtime().as_deref())?,
            poststart: list("poststart", hooks.poststart().as_deref())?,
            poststop: list("poststop", hooks.poststop().as_deref())?,
            version: spec.version().clone(),
            annotations: spec.annotations().clone().unwrap_or_default(),
        })
    }

    /// Takes them out of a spec.
    pub(super) fn take(spec: &mut Spec) -> Result<Self, Failure> {
        let taken = Self::of(spec)?;
        if let Some(hooks) = spec.hooks_mut() {
            #[allow(deprecated, reason = "as above: there are such hooks")]
            hooks.set_prestart(None);
            hooks.set_create_runtime(None);
            hooks.set_poststart(None);
            hooks.set_poststop(None);
        }
        Ok(taken)
    }
}

fn list(kind: &str, hooks: Option<&[Hook]>) -> Result<Vec<HostHook>, Failure> {
    let hooks = hooks.unwrap_or_default();
    if hooks.len() > MAX_HOOKS {
        return Err(bad(&format!("hooks.{kind} holds more than {MAX_HOOKS}")));
    }
    let each = hooks.iter().enumerate().map(|(index, hook)| {
        let field = |name: &str| format!("hooks.{kind}[{index}].{name}");
        let path: &Path = hook.path();
        if !path.is_absolute() {
            let text = format!("{}: {:?} is not absolute", field("path"), path);
            return Err(bad(&text));
        }
        let timeout = hook.timeout().map(|seconds| match u64::try_from(seconds) {
            Ok(seconds @ 1..) => Ok(Duration::from_secs(seconds)),
            _ => Err(bad(&format!(
                "{}: {seconds} is not greater than 0",
                field("timeout")
            ))),
        });
        let arguments = hook.args().clone().unwrap_or_default();
        Ok(HostHook {
            path: path.to_owned(),
            // A program has a name, even where the spec gives it none.
            arguments: match arguments.is_empty() {
                true => vec![path.display().to_string()],
                false => arguments,
            },
            environment: hook.env().clone(),
            timeout: timeout.transpose()?,
        })
    });
    each.collect()
}
