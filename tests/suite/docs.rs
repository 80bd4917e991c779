//! What README and docs tell people to type is what the program takes.

use std::{collections::BTreeSet, path::Path, process::Stdio};

use crate::cli::{pentimento, text};

/// Documents for people who use the program.
const DOCUMENTS: [&str; 6] = [
    "README.md",
    "docs/PLAN.md",
    "docs/WEIGHTS.md",
    "docs/MEMORY.md",
    "docs/PERFORMANCE.md",
    "docs/CUDA.md",
];
fn read(document: &str) -> String {
    fs_err::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(document)).unwrap()
}

/// What stands between backticks in a text without code blocks.
fn inline_code(text: &str) -> impl Iterator<Item = String> {
    let prose: String = text.split("```").step_by(2).collect();
    let code: Vec<String> = prose.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    code.into_iter()
}

/// The commands of a document, each as the words after the program's name.
fn commands(document: &str) -> Vec<Vec<String>> {
    let text = read(document);
    let blocks = text.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let lines = blocks.flat_map(|block| {
        let whole = block.replace("\\\n", " ");
        whole.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    lines
        .chain(inline_code(&text).map(|code| code.replace('\n', " ")))
        .filter_map(|line| {
            let starts = ["pentimento ", "cargo run --release -- "];
            let rest = starts.iter().find_map(|start| line.strip_prefix(start))?;
            // Optional parts count as given, and an ellipsis as what was left out.
            let words = shlex::split(&rest.replace(['[', ']'], " ").replace(" … ", " "))?;
            let own = words.into_iter().take_while(|word| word != ">" && word != "|");
            Some(own.filter(|word| !word.contains('|')).collect())
        })
        .collect()
}

/// The program's help on a command.
fn help(words: &[String]) -> Result<String, String> {
    let output = pentimento().args(words).arg("--help").stdin(Stdio::null()).output().unwrap();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

#[test]
fn commands_in_documents_are_understood() {
    let mut seen = 0;
    for document in DOCUMENTS {
        for words in commands(document) {
            seen += 1;
            if let Err(error) = help(&words) {
                panic!("{document}: pentimento {words:?}: {error}");
            }
        }
    }
    assert!(seen > 20, "{seen} commands found");
    let wrong = ["edit", "--no-such-flag"].map(str::to_owned);
    assert!(help(&wrong).is_err());
}

/// Whether any command takes this flag, under whichever of its names.
fn is_taken(flag: &str) -> bool {
    const COMMANDS: [&[&str]; 11] = [
        &["edit"],
        &["plan"],
        &["ask"],
        &["bench"],
        &["convert"],
        &["info"],
        &["doctor"],
        &["eval", "scenes"],
        &["eval", "drift"],
        &["models", "list"],
        &["models", "verify"],
    ];
    COMMANDS.iter().any(|command| {
        let words = command.iter().chain([&flag]).map(|word| (*word).to_owned());
        // The flag may lack its value here, but is known.
        help(&words.collect::<Vec<_>>())
            .map_or_else(|error| !error.contains("unexpected argument"), |_| true)
    })
}

#[test]
fn flags_in_documents_exist() {
    let mut flags = BTreeSet::new();
    for document in ["README.md", "docs/PLAN.md", "docs/WEIGHTS.md", "docs/MEMORY.md"] {
        for code in inline_code(&read(document)).filter(|code| code.starts_with("--")) {
            let words = code.split_whitespace().filter(|word| word.starts_with("--"));
            flags.extend(words.map(|word| word.split('=').next().unwrap().to_owned()));
        }
    }
    for flag in &flags {
        assert!(is_taken(flag), "no command takes {flag}");
    }
    assert!(flags.len() > 30, "{flags:?}");
    assert!(!is_taken("--no-such-flag"));
}
