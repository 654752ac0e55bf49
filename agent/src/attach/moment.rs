//! Moments as people and other tools read them: RFC 3339 in UTC, to the
//! nanosecond, for serde's `with`.

use std::time::SystemTime;

use serde::{Deserialize, Deserializer, Serializer, de::Error};

pub(super) fn serialize<S: Serializer>(moment: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&humantime::format_rfc3339_nanos(*moment))
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
    let text = String::deserialize(from)?;
    humantime::parse_rfc3339(&text).map_err(|error| D::Error::custom(format!("{text:?}: {error}")))
}

/// A moment that may never have been.
pub(super) mod optional {
    use std::time::SystemTime;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Moment(#[serde(with = "super")] SystemTime);

    pub(in super::super) fn serialize<S: Serializer>(
        moment: &Option<SystemTime>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        moment.map(Moment).serialize(to)
    }

    pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<SystemTime>, D::Error> {
        Ok(Option::<Moment>::deserialize(from)?.map(|moment| moment.0))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Both {
        #[serde(with = "super")]
        once: SystemTime,
        #[serde(with = "super::optional")]
        perhaps: Option<SystemTime>,
    }

    #[test]
    fn a_moment_is_text_and_comes_back_whole() {
        let once = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_000_000_007);
        for (perhaps, text) in [
            (Some(once), r#""2023-11-14T22:13:20.000000007Z""#),
            (None, "null"),
        ] {
            let both = Both { once, perhaps };
            let json = serde_json::to_string(&both).unwrap();
            assert!(json.contains(r#""once":"2023-11-14T22:13:20.000000007Z""#));
            assert!(json.contains(&format!(r#""perhaps":{text}"#)), "{json}");
            assert_eq!(serde_json::from_str::<Both>(&json).unwrap(), both);
        }
        let error = serde_json::from_str::<Both>(r#"{"once":"soon","perhaps":null}"#);
        assert!(error.unwrap_err().to_string().contains("soon"));
    }
}
