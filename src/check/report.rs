//! The results as rows, as `raw.csv` and as `report.md`.

use std::{borrow::Cow, fmt::Write as _, path::Path};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    ops::cuda::parity::Outcome,
};

/// Everything that was found.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// In the order in which it was found.
    pub rows: Vec<Row>,
}

/// One check or one time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The part of the suite.
    pub part: Cow<'static, str>,
    /// What was checked or timed.
    pub name: String,
    /// What was found.
    pub finding: Finding,
}

/// What one row says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Finding {
    /// A number that must not exceed a limit; NaN does.
    Checked {
        /// The number.
        #[serde(with = "as_text")]
        value: f64,
        /// Its limit.
        #[serde(with = "as_text")]
        limit: f64,
    },
    /// Something that could not be done.
    Failed(String),
    /// Something that was left out, and why.
    LeftOut(String),
    /// Seconds for one run, and what rate that is.
    Timed {
        /// The median of the runs.
        #[serde(with = "as_text")]
        seconds: f64,
        /// Units of work in a second.
        #[serde(with = "as_text")]
        rate: f64,
        /// What is counted.
        unit: Cow<'static, str>,
    },
}

impl Row {
    /// A kernel's row: its worse error, as a share of what it may be.
    #[must_use]
    pub fn of_outcome(outcome: &Outcome) -> Self {
        let name = format!("{}: {}", outcome.operation, outcome.case);
        let finding = match &outcome.failure {
            Some(failure) => Finding::Failed(failure.clone()),
            None => {
                let share = |i: usize| {
                    if outcome.error[i] <= outcome.limit[i] && outcome.limit[i] == 0.0 {
                        0.0
                    } else {
                        outcome.error[i] / outcome.limit[i]
                    }
                };
                let value = if share(0).is_nan() { f64::NAN } else { share(0).max(share(1)) };
                Finding::Checked { value, limit: 1.0 }
            }
        };
        Self { part: "parity".into(), name, finding }
    }

    /// Whether the row is no failure.
    #[must_use]
    pub fn passed(&self) -> bool {
        match self.finding {
            // Written so that NaN fails.
            Finding::Checked { value, limit } => value <= limit,
            Finding::Failed(_) => false,
            Finding::LeftOut(_) | Finding::Timed { .. } => true,
        }
    }

    /// The row for a person.
    #[must_use]
    pub fn line(&self) -> String {
        let mark = if self.passed() { "ok  " } else { "FAIL" };
        let Self { part, name, finding } = self;
        match finding {
            Finding::Checked { value, limit } => {
                format!("{mark} {part}: {name}: {value:.4} of {limit:.4}")
            }
            Finding::Failed(why) => format!("{mark} {part}: {name}: {why}"),
            Finding::LeftOut(why) => format!("left out {part}: {name}: {why}"),
            Finding::Timed { seconds, rate, unit } => {
                format!("time {part}: {name}: {:.3} ms, {rate:.1} {unit}", seconds * 1e3)
            }
        }
    }
}

impl Report {
    /// Whether no check failed.
    #[must_use]
    pub fn passed(&self) -> bool {
        self.rows.iter().all(Row::passed)
    }

    /// `part,name,kind,value,limit or rate,unit or reason`, a line for each row after the header.
    #[must_use]
    pub fn csv(&self) -> String {
        let mut text = String::from("part,name,kind,value,limit_or_rate,unit_or_reason\n");
        for Row { part, name, finding } in &self.rows {
            let [name, rest] = [quoted(name), finding.fields()];
            // Writing to a string cannot fail.
            let _infallible = writeln!(text, "{part},{name},{rest}");
        }
        text
    }

    /// The report for a person, on `device`.
    #[must_use]
    pub fn markdown(&self, device: &str, version: &str) -> String {
        let failed: Vec<&Row> = self.rows.iter().filter(|row| !row.passed()).collect();
        let checks = self.rows.iter().filter(|row| matches!(row.finding, Finding::Checked { .. }));
        let mut text = format!(
            "# {device}\n\npentimento {version}. {} checks, {} failed. All rows: raw.csv.\n",
            checks.count(),
            failed.len()
        );
        for row in failed {
            let _infallible = writeln!(text, "- {}", row.line());
        }
        let times = self.rows.iter().filter_map(|row| match &row.finding {
            Finding::Timed { seconds, rate, unit } => Some((row, seconds, rate, unit)),
            _ => None,
        });
        text.push_str("\n| part | what | ms | rate |\n|---|---|---|---|\n");
        for (row, seconds, rate, unit) in times {
            let (part, name, ms) = (&row.part, &row.name, seconds * 1e3);
            let _infallible = writeln!(text, "| {part} | {name} | {ms:.3} | {rate:.1} {unit} |");
        }
        text
    }

    /// Writes `raw.csv` and `report.md` into `folder`, which is made if need be.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn write(&self, folder: &Path, device: &str) -> Result<()> {
        let write = |name: &str, text: String| {
            fs_err::create_dir_all(folder).and_then(|()| fs_err::write(folder.join(name), text))
        };
        write("raw.csv", self.csv()).map_err(Error::from)?;
        let text = self.markdown(device, env!("CARGO_PKG_VERSION"));
        write("report.md", text).map_err(Error::from)
    }
}

impl Finding {
    /// What went wrong, in one line.
    pub(super) fn failed(error: &dyn std::fmt::Display) -> Self {
        Self::Failed(error.to_string().lines().next().unwrap_or_default().to_owned())
    }

    fn fields(&self) -> String {
        match self {
            Self::Checked { value, limit } => format!("checked,{value:e},{limit:e},"),
            Self::Failed(why) => format!("failed,,,{}", quoted(why)),
            Self::LeftOut(why) => format!("left out,,,{}", quoted(why)),
            Self::Timed { seconds, rate, unit } => format!("timed,{seconds:e},{rate:e},{unit}"),
        }
    }
}

/// Numbers as text, since JSON has neither NaN nor infinity.
mod as_text {
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(super) fn serialize<S: Serializer>(number: &f64, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&format_args!("{number:e}"))
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<f64, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\"").replace('\n', " "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_says_what_failed() {
        let row = |name: &str, finding| Row { part: "part".into(), name: name.to_owned(), finding };
        let mut report = Report::default();
        report.rows.push(row("good, \"quoted\"", Finding::Checked { value: 0.5, limit: 1.0 }));
        report
            .rows
            .push(row("time", Finding::Timed { seconds: 0.002, rate: 3.0, unit: "GB/s".into() }));
        report.rows.push(row("none", Finding::LeftOut("no need".to_owned())));
        assert!(report.passed());
        let json = serde_json::to_string(&report.rows).unwrap();
        assert_eq!(serde_json::from_str::<Vec<Row>>(&json).unwrap(), report.rows);
        let bad =
            serde_json::to_string(&Finding::Checked { value: f64::NAN, limit: f64::INFINITY });
        let bad: Finding = serde_json::from_str(&bad.unwrap()).unwrap();
        let Finding::Checked { value, limit } = bad else { panic!("{bad:?}") };
        assert!(value.is_nan() && limit.is_infinite());
        let csv = report.csv();
        assert!(csv.contains("part,\"good, \"\"quoted\"\"\",checked,5e-1,1e0,"), "{csv}");
        assert_eq!(csv.lines().count(), 4);
        for bad in
            [Finding::Checked { value: f64::NAN, limit: 1.0 }, Finding::Failed("x".to_owned())]
        {
            let mut report = report.clone();
            report.rows.push(row("bad", bad));
            assert!(!report.passed());
            let text = report.markdown("a device", "1.2.3");
            assert!(text.contains("1 failed") && text.contains("FAIL part: bad"), "{text}");
            assert!(text.contains("| part | time | 2.000 | 3.0 GB/s |"), "{text}");
        }
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("new/folder");
        report.write(&folder, "a device").unwrap();
        assert_eq!(fs_err::read_to_string(folder.join("raw.csv")).unwrap(), csv);
    }
}
