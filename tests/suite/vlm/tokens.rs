//! The tokenizer with the real Qwen2 vocabulary; see `tests/data/make/qwen2_vocabulary.py`.

use std::{collections::HashMap, io::Read, time::Instant};

use pentimento::{
    vlm::{IMAGE_PLACEHOLDER, Tokenizer},
    weights::ModelFiles,
};
use serde_json::json;

use super::{data, read_json};

/// The real Qwen2 vocabulary, in the three files of the older form.
fn qwen2() -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let tokenizer = folder.path().join("tokenizer");
    fs_err::create_dir(&tokenizer).unwrap();
    let mut merges = String::new();
    let packed = fs_err::File::open(data("vlm/qwen2/merges.txt.gz")).unwrap();
    flate2::read::GzDecoder::new(packed).read_to_string(&mut merges).unwrap();
    // The first tokens are the bytes, printable ones first; then the merges in their order.
    let printable = |byte: &u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let (plain, moved): (Vec<u32>, Vec<u32>) = (0..256).partition(printable);
    let shifted = (256..).take(moved.len());
    let bytes = plain.into_iter().chain(shifted).map(|c| char::from_u32(c).unwrap().to_string());
    let lines = merges.lines().skip(1).map(|line| line.replace(' ', ""));
    let vocab: HashMap<String, usize> =
        bytes.chain(lines).enumerate().map(|(id, token)| (token, id)).collect();
    assert_eq!(vocab.len(), 151_643);
    fs_err::write(tokenizer.join("vocab.json"), json!(vocab).to_string()).unwrap();
    fs_err::write(tokenizer.join("merges.txt"), merges).unwrap();
    let config = "tokenizer_config.json";
    fs_err::copy(data("vlm/qwen2").join(config), tokenizer.join(config)).unwrap();
    Tokenizer::load(&ModelFiles::Folder(folder.path().to_owned()), &["tokenizer"]).unwrap()
}

#[derive(serde::Deserialize)]
struct TextCase {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

#[test]
fn the_real_vocabulary_equals_transformers_and_llama_cpp() {
    let tokenizer = qwen2();
    assert_eq!(tokenizer.id(IMAGE_PLACEHOLDER), Some(151_655));
    assert_eq!(tokenizer.id_end(), 151_665);
    let cases: Vec<TextCase> = read_json(&data("vlm/qwen2/cases.json"));
    assert!(cases.len() > 200);
    for case in cases {
        assert_eq!(tokenizer.encode(&case.text).unwrap(), case.ids, "{:?}", case.text);
        assert_eq!(tokenizer.decode(&case.ids).unwrap(), case.decoded, "{:?}", case.text);
        let mut stream = tokenizer.stream();
        let mut text = String::new();
        for id in &case.ids {
            text.push_str(&stream.push(*id).unwrap());
        }
        text.push_str(&stream.finish().unwrap());
        assert_eq!(text, case.decoded, "streamed");
    }
    let inputs = fs_err::read_to_string(data("vlm/qwen2/llama_cpp.inp")).unwrap();
    let outputs = fs_err::read_to_string(data("vlm/qwen2/llama_cpp.out")).unwrap();
    let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    assert!(inputs.len() > 40);
    for (text, line) in inputs.iter().zip(outputs.lines()) {
        let ids: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(tokenizer.encode(text).unwrap(), ids, "{text:?}");
    }
}

#[test]
fn long_texts_are_tokenized_whole_and_in_time() {
    let tokenizer = qwen2();
    for unit in [" ", "a", "\n", "中", "a b\n  c, ", "é'l", "\u{1f642}", "1", "\t\r\n "] {
        let text = unit.repeat(100_000_usize.div_ceil(unit.chars().count()));
        let start = Instant::now();
        let ids = tokenizer.encode(&text).unwrap();
        assert!(start.elapsed().as_secs() < 20, "{unit:?} took {:?}", start.elapsed());
        assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{unit:?}");
    }
    // What comes after a long run is split as ever.
    let after = tokenizer.encode(" make it red").unwrap();
    let ids = tokenizer.encode(&format!("{}\nx make it red", " ".repeat(100_000))).unwrap();
    assert!(ids.ends_with(&after), "{:?}", &ids[ids.len() - 8..]);
}

#[test]
fn unfinished_characters_wait_for_their_last_byte() {
    let tokenizer = qwen2();
    let ids = tokenizer.encode("x🫠").unwrap();
    assert!(ids.len() > 2, "the face must be several tokens");
    let mut stream = tokenizer.stream();
    let pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    assert_eq!(pieces.concat(), "x🫠");
    assert!(pieces[1..pieces.len() - 1].iter().all(String::is_empty), "{pieces:?}");
    let mut stream = tokenizer.stream();
    let start: String = ids[..2].iter().map(|id| stream.push(*id).unwrap()).collect();
    assert_eq!((start.as_str(), stream.finish().unwrap().as_str()), ("x", "\u{fffd}"));
}
