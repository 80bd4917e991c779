//! Files that are made to do harm, one by one: what each claims, and what it is told.

use std::path::{Path, PathBuf};

use pentimento::{
    Error, ModelError,
    vlm::{ChatTemplate, Message, Tokenizer},
    weights::{Checkpoint, LoraFile, ModelFiles},
};

use crate::{
    allocated, alone,
    gguf_writer::{Entry, Gguf},
    readers::data,
    seeds,
};

/// What reading the head of any file may allocate, in bytes.
const HEAD_BYTES_MAX: usize = 4 << 20;

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs_err::create_dir_all(path.parent().unwrap()).unwrap();
        fs_err::write(&path, bytes).unwrap();
        path
    }

    fn files(&self) -> ModelFiles {
        ModelFiles::Folder(self.0.path().to_owned())
    }
}

/// Opens a file that must be refused, in little memory, by an error that names it.
#[track_caller]
fn refused(path: &Path, words: &[&str]) {
    let (opened, bytes) = allocated(|| Checkpoint::open_file(path));
    let error = opened.unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Model(_)), "{error:?}");
    assert!(bytes <= HEAD_BYTES_MAX, "{bytes} bytes allocated");
    let name = path.file_name().unwrap().to_str().unwrap();
    for word in words.iter().chain(&[name]) {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

/// A safetensors file with this header and so many bytes of data.
fn with_header(header: &str, data: usize) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [&length[..], header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn safetensors_headers_that_lie() {
    let _alone = alone();
    let folder = Folder::new();
    let one = |entry: &str, data| with_header(&format!("{{\"a\":{entry}}}"), data);
    let max = u64::MAX;
    let cases: Vec<(Vec<u8>, &str)> = vec![
        // Counts.
        (
            one(&format!(r#"{{"dtype":"F32","shape":[{max}],"data_offsets":[0,4]}}"#), 4),
            "x.safetensors",
        ),
        (
            one(&format!(r#"{{"dtype":"F32","shape":[{max},{max}],"data_offsets":[0,4]}}"#), 4),
            "x.safetensors",
        ),
        (
            one(&format!(r#"{{"dtype":"F32","shape":[1],"data_offsets":[{},{max}]}}"#, max - 4), 4),
            "x.safetensors",
        ),
        (one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, 4), "x.safetensors"),
        (one(r#"{"dtype":"F32","shape":[1e3],"data_offsets":[0,4]}"#, 4), "x.safetensors"),
        // Places.
        (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#, 4), "x.safetensors"),
        (one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#, 4), "truncated"),
        (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#, 8), "x.safetensors"),
        (one(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#, 5), "x.safetensors"),
        (
            with_header(
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                4,
            ),
            "x.safetensors",
        ),
        (
            with_header(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            ),
            "x.safetensors",
        ),
        // Types and names.
        (one(r#"{"dtype":"F31","shape":[1],"data_offsets":[0,4]}"#, 4), "F31"),
        (
            with_header(
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            ),
            "x.safetensors",
        ),
        // Lengths of the header.
        ([&max.to_le_bytes()[..], b"{}"].concat(), "truncated"),
        ([&(u64::MAX - 7).to_le_bytes()[..], b"{}"].concat(), "truncated"),
        ([&(1_u64 << 63).to_le_bytes()[..], b"{}"].concat(), "truncated"),
        (with_header(&"{\"a\":".repeat(100_000), 0), "x.safetensors"),
        (with_header(&format!("{{\"a\":{}", "[".repeat(100_000)), 0), "x.safetensors"),
        (with_header("{\"__metadata__\":{\"a\":1}}", 0), "x.safetensors"),
    ];
    for (bytes, words) in &cases {
        let path = folder.write("x.safetensors", bytes);
        refused(&path, &[words]);
    }
    // A name of a megabyte is a name.
    let name = "n".repeat(1 << 20);
    let bytes = with_header(
        &format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#),
        4,
    );
    assert!(Checkpoint::open_file(&folder.write("x.safetensors", &bytes)).unwrap().contains(&name));
}

/// A change of a sound GGUF file, and what is said about it.
type Change = (Box<dyn Fn(&mut Gguf)>, &'static str);

fn sound_gguf() -> Gguf {
    let mut file = Gguf::new();
    file.text("general.architecture", "qwen_image");
    for name in ["a", "b"] {
        file.raw(name, &[8], 0, &[0; 32]);
    }
    file
}

#[track_caller]
fn refused_gguf(changes: Vec<Change>) {
    let folder = Folder::new();
    assert!(Checkpoint::open_file(&folder.write("x.gguf", &sound_gguf().bytes())).is_ok());
    for (change, words) in changes {
        let mut file = sound_gguf();
        change(&mut file);
        refused(&folder.write("x.gguf", &file.bytes()), &[words]);
    }
}

#[test]
fn gguf_headers_that_lie() {
    let _alone = alone();
    let max = u64::MAX;
    refused_gguf(vec![
        (Box::new(|file| file.tensor_count = Some(u64::MAX)), "tensors"),
        (Box::new(|file| file.tensor_count = Some(3)), "tensor"),
        (Box::new(|file| file.key_count = Some(u64::MAX)), "keys"),
        (Box::new(|file| file.key_count = Some(60_000)), "key"),
        (Box::new(|file| file.version = 0x0300_0000), "big-endian"),
        (Box::new(|file| file.version = 1), "version 1"),
        (Box::new(move |file| file.tensors[0].dims = vec![max]), "tensor a"),
        (Box::new(move |file| file.tensors[0].dims = vec![max, 2]), "tensor a"),
        (Box::new(|file| file.tensors[0].dims = vec![1 << 33, 1 << 33]), "tensor a"),
        (Box::new(|file| file.tensors[0].dims = vec![1; 2000]), "tensor a"),
        (Box::new(|file| file.tensors[1].offset = 0), "shares bytes"),
        (Box::new(|file| file.tensors[1].offset = 16), "tensor b"),
        (Box::new(|file| file.tensors[1].offset = 1), "tensor b"),
        (Box::new(|file| file.tensors[1].offset = u64::MAX - 31), "tensor b"),
        (Box::new(|file| file.tensors[1].name = "a".to_owned()), "twice"),
        (Box::new(|file| file.tensors[0].kind = 99), "99"),
        (Box::new(|file| file.tensors[0].kind = 12), "tensor a"),
        (Box::new(|file| file.int("general.alignment", 0)), "alignment"),
        (Box::new(|file| file.int("general.alignment", 7)), "alignment"),
        (Box::new(|file| file.int("general.alignment", 1 << 31)), "alignment"),
        (Box::new(|file| file.text("general.alignment", "32")), "alignment"),
        (Box::new(|file| file.text("general.architecture", "again")), "general.architecture"),
    ]);
    // A tensor without a name, and one that stands behind the end.
    let (folder, mut file) = (Folder::new(), sound_gguf());
    let (dims, name) = (vec![1 << 20], String::new());
    file.tensors.push(Entry { name, dims, kind: 0, offset: 64 });
    refused(&folder.write("x.gguf", &file.bytes()), &["truncated"]);
}

#[test]
fn gguf_metadata_that_lies() {
    let _alone = alone();
    refused_gguf(vec![
        // Four gigabytes of text, of a list, of lists in lists.
        (Box::new(|file| file.raw_key("k", 8, &(1_u64 << 32).to_le_bytes())), "4294967296"),
        (
            Box::new(|file| {
                file.raw_key(
                    "k",
                    9,
                    &[&4_u32.to_le_bytes()[..], &(1_u64 << 32).to_le_bytes()].concat(),
                )
            }),
            "4294967296",
        ),
        (
            Box::new(|file| {
                file.raw_key(
                    "k",
                    9,
                    &[&4_u32.to_le_bytes()[..], &(1_u64 << 24).to_le_bytes()].concat(),
                )
            }),
            "the end of the file",
        ),
        (
            Box::new(|file| {
                file.raw_key("k", 9, &[&9_u32.to_le_bytes()[..], &1_u64.to_le_bytes()].concat())
            }),
            "array of arrays",
        ),
        (Box::new(|file| file.raw_key("k", 13, &[])), "value type 13"),
        (Box::new(|file| file.raw_key("k", 7, &[2])), "truth value"),
        (Box::new(|file| file.text(&"k".repeat(1 << 17), "")), "65536"),
        (Box::new(|file| file.ints("comfy.gguf.orig_shape.a", &[-1, -8])), "orig_shape"),
        (Box::new(|file| file.ints("comfy.gguf.orig_shape.a", &[3])), "orig_shape"),
        (Box::new(|file| file.ints("comfy.gguf.orig_shape.a", &[1; 100])), "orig_shape"),
    ]);
}

/// Every prefix of a file is refused, or is the whole file.
#[test]
fn files_that_end_anywhere_in_their_header_are_refused() {
    let _alone = alone();
    let folder = Folder::new();
    let (gguf, safetensors) = (seeds::gguf().swap_remove(0), seeds::scaled().swap_remove(2));
    let config = seeds::lora().swap_remove(1);
    for (name, bytes) in
        [("x.gguf", gguf), ("x.safetensors", safetensors), ("y.safetensors", config)]
    {
        // The last tensor of the GGUF file has 20 bytes of padding behind it.
        let end = if name == "x.gguf" { bytes.len() - 20 } else { bytes.len() };
        for length in 0..end {
            let path = folder.write(name, &bytes[..length]);
            let error = Checkpoint::open_file(&path).err();
            let error = error.unwrap_or_else(|| panic!("{length} of {} bytes opened", bytes.len()));
            assert!(matches!(error, Error::Model(ModelError::Corrupt { .. })), "{length}: {error}");
            assert!(error.to_string().contains(name), "{length}: {error}");
        }
        assert!(Checkpoint::open_file(&folder.write(name, &bytes)).is_ok());
    }
}

#[test]
fn indices_lead_nowhere_else() {
    let _alone = alone();
    let folder = Folder::new();
    folder.write("part/a.safetensors", &seeds::one_tensor("a"));
    folder.write("b.safetensors", &seeds::one_tensor("b"));
    for (index, words) in [
        (r#"{"weight_map":{"b":"../b.safetensors"}}"#, "a file name"),
        (r#"{"weight_map":{"b":"/etc/passwd"}}"#, "a file name"),
        (r#"{"weight_map":{"b":"..\\b.safetensors"}}"#, "a file name"),
        (r#"{"weight_map":{"b":"."}}"#, "a file name"),
        (r#"{"weight_map":{"b":""}}"#, "part"),
        (r#"{"weight_map":{"b":"none.safetensors"}}"#, "none.safetensors"),
        (r#"{"weight_map":{"b":"model.safetensors.index.json"}}"#, "model.safetensors.index.json"),
        (r#"{"weight_map":{"b":"a.safetensors"}}"#, "tensor b listed"),
        (r#"{"weight_map":{}}"#, "model.safetensors.index.json"),
        (r#"{"weight_map":[]}"#, "model.safetensors.index.json"),
        (r#"{"weight_map":{"a":7}}"#, "model.safetensors.index.json"),
    ] {
        folder.write("part/model.safetensors.index.json", index.as_bytes());
        let error = folder.files().checkpoint("part", "model").unwrap_err();
        assert!(matches!(error, Error::Model(_)), "{error:?}");
        assert!(error.to_string().contains(words), "no {words:?} in: {error}");
    }
}

/// Templates are programs: they end, and they stay small.
#[test]
fn chat_templates_that_do_not_end_are_stopped() {
    let _alone = alone();
    let folder = Folder::new();
    for template in [
        "{% for a in range(100000) %}{% for b in range(100000) %}{{ a }}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 4000000000 }}",
        "{% set x = namespace(s='xxxxxxxxxxxxxxxx') %}{% for i in range(60) %}{% set x.s = x.s ~ x.s %}{% endfor %}{{ x.s }}",
        "{{ range(4000000000) | list }}",
        "{{ 'x'.ljust(4000000000) }}",
        "{{ 'x' | indent(4000000000) }}",
        "{{ [0] * 4000000000 }}",
        "{{ '%4000000000d' | format(1) }}",
    ] {
        folder.write("tokenizer/chat_template.jinja", template.as_bytes());
        let (rendered, bytes) = allocated(|| {
            ChatTemplate::load(&folder.files(), &["tokenizer"])
                .and_then(|loaded| loaded.render(&[Message::user(1, "x")]))
        });
        assert!(bytes <= 96 << 20, "{bytes} bytes allocated by {template}");
        assert!(matches!(rendered, Err(Error::Request(_))), "{template}: {rendered:?}");
    }
}

#[test]
fn tokenizers_that_contradict_themselves_are_refused() {
    let _alone = alone();
    let folder = Folder::new();
    let text =
        fs_err::read_to_string(data("reference/tiny-qwen-2511/tokenizer/tokenizer.json")).unwrap();
    let sound: serde_json::Value = serde_json::from_str(&text).unwrap();
    type Change = fn(&mut serde_json::Value);
    let changes: [Change; 6] = [
        |json| json["model"]["merges"] = serde_json::json!([["never", "there"]]),
        |json| json["model"]["vocab"] = serde_json::json!({ "a": -1 }),
        |json| json["model"]["type"] = "WordPiece".into(),
        |json| json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(".into(),
        |json| json["added_tokens"][0]["id"] = (1_u64 << 40).into(),
        |json| json["model"] = serde_json::Value::Null,
    ];
    for change in changes {
        let mut json = sound.clone();
        change(&mut json);
        folder.write("tokenizer/tokenizer.json", json.to_string().as_bytes());
        let error = Tokenizer::load(&folder.files(), &["tokenizer"]).unwrap_err();
        assert!(matches!(error, Error::Model(_)), "{error:?}");
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
    }
}

#[test]
fn patterns_of_adapters_that_take_forever_are_refused() {
    let _alone = alone();
    let folder = Folder::new();
    folder.write("transformer/diffusion_pytorch_model.safetensors", &seeds::small_transformer());
    let path = folder.write("adapter_model.safetensors", &seeds::bare_lora());
    let slow = format!("(?=((x+x+)+y|{}))\\1+!", "(.*)*".repeat(8));
    for pattern in
        [slow.as_str(), "(", "(?R)", "((((((((((.{1,1000}){1,1000}){1,1000}){1,1000})))))))"]
    {
        let config = serde_json::json!({
            "peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": { pattern: 2 },
        });
        folder.write("adapter_config.json", config.to_string().as_bytes());
        let (opened, bytes) = allocated(|| LoraFile::open(&path, 1.0));
        assert!(bytes <= 64 << 20, "{bytes} bytes allocated for {pattern}");
        if let Err(error) = opened {
            assert!(error.to_string().contains("adapter_config.json"), "{error}");
        }
    }
}
