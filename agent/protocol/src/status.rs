//! The one table of failures and ttrpc status codes: the agent answers the shim by it, and the shim
//! containerd.

use kata_like_failure::{Failure, Kind, one_line};
use ttrpc::Code;

/// Kinds that a caller acts on, and their codes. All others are `UNKNOWN`, as runc's shim answers.
///
/// `Unsupported` is among those: `UNIMPLEMENTED` says that a method is missing, and containerd then
/// calls another version of the task API.
const CODES: [(Kind, Code); 5] = [
    (Kind::NotFound, Code::NOT_FOUND),
    (Kind::AlreadyExists, Code::ALREADY_EXISTS),
    (Kind::WrongState, Code::FAILED_PRECONDITION),
    (Kind::BadRequest, Code::INVALID_ARGUMENT),
    (Kind::DeadlineExceeded, Code::DEADLINE_EXCEEDED),
];

/// The longest text of a status in characters: with it an answer stays below
/// [`MAX_ANSWER`](crate::MAX_ANSWER).
const MAX_TEXT: usize = 8000;

/// The status that answers a call which ended with `failure`: its code, and the chain of causes on
/// one line, cut off after 8000 characters.
pub fn of(failure: &Failure) -> ttrpc::Error {
    let kind = failure.kind();
    let found = CODES.iter().find(|(of, _)| *of == kind);
    let code = found.map_or(Code::UNKNOWN, |(_, code)| *code);
    let line: String = one_line(failure).chars().take(MAX_TEXT).collect();
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, line))
}

/// The kind of the failure that a status with `code` tells of.
pub fn kind(code: Code) -> Kind {
    let found = CODES.iter().find(|(_, of)| *of == code);
    found.map_or(Kind::Failed, |(kind, _)| *kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_caller_acts_on_comes_back_and_all_else_is_unknown() {
        for (name, code) in CODES {
            let ttrpc::Error::RpcStatus(status) = of(&Failure::new(name, "open x")) else {
                panic!("{name:?} has no status");
            };
            assert_eq!(status.code(), code);
            assert_eq!(status.message, "open x");
            assert_eq!(kind(status.code()), name);
        }
        for name in [Kind::Unsupported, Kind::Failed] {
            let ttrpc::Error::RpcStatus(status) = of(&Failure::new(name, "open x")) else {
                panic!("{name:?} has no status");
            };
            assert_eq!(status.code(), Code::UNKNOWN);
        }
        assert_eq!(kind(Code::UNIMPLEMENTED), Kind::Failed);
        let long = of(&Failure::new(Kind::Failed, "\u{1f980}".repeat(1 << 20)));
        assert!(long.to_string().len() < crate::MAX_ANSWER);
    }
}
