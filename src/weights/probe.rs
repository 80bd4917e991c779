//! What a file really is, told from its first bytes, before anything is read out of it.

use crate::error::{ModelError, Result};

/// Files that are often found where a safetensors file should be.
const LOOK_ALIKES: &[(&[u8], &str, &str)] = &[
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file itself",
        "run `git lfs pull` in the folder it came from, or download the file again",
    ),
    (b"<!DOCTYPE", "an HTML page", "the download needs a login or a licence; download it again"),
    (b"<!doctype", "an HTML page", "the download needs a login or a licence; download it again"),
    (b"<html", "an HTML page", "the download needs a login or a licence; download it again"),
    (b"GGUF", "a GGUF file", "a folder's weights are safetensors files"),
    (
        b"PK\x03\x04",
        "a zip archive, as PyTorch checkpoints are",
        "pickled checkpoints can run code and are not read; convert to safetensors",
    ),
];
/// First byte of a pickle, and the protocols that may follow it. As the length of a header these
/// two bytes are possible, so they count only where no header follows.
const PICKLE: (u8, std::ops::RangeInclusive<u8>) = (0x80, 2..=5);

/// Checks that `bytes` can be a safetensors file.
///
/// # Errors
/// [`ModelError::Corrupt`] that names what the file is instead.
pub fn check_safetensors(path: &str, bytes: &[u8]) -> Result<()> {
    let corrupt = |found: &str, hint: &str| {
        Err(ModelError::Corrupt {
            path: path.to_owned(),
            found: found.to_owned(),
            expected: "a safetensors or GGUF file".to_owned(),
            hint: hint.to_owned(),
        }
        .into())
    };
    if bytes.is_empty() {
        return corrupt("an empty file", "download it again");
    }
    for (start, found, hint) in LOOK_ALIKES {
        if bytes.starts_with(start) {
            return corrupt(found, hint);
        }
    }
    let Some(length) = bytes.first_chunk::<8>() else {
        return corrupt(&format!("a file of {} bytes", bytes.len()), "download it again");
    };
    let header_bytes = u64::from_le_bytes(*length);
    let is_pickle = bytes[0] == PICKLE.0 && PICKLE.1.contains(&bytes[1]);
    if is_pickle && (bytes.get(8) != Some(&b'{') || header_bytes > bytes.len() as u64 - 8) {
        let hint = "pickles can run code and are not read; convert to safetensors";
        return corrupt("a Python pickle", hint);
    }
    if bytes.get(8) != Some(&b'{') {
        return corrupt("a file without a safetensors header", "check that this is the right file");
    }
    if header_bytes > bytes.len() as u64 - 8 {
        let found = format!(
            "a header of {header_bytes} bytes in a file of {} bytes: the file is truncated",
            bytes.len()
        );
        return corrupt(&found, "download it again");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes: &[u8], word: &str) {
        let message = check_safetensors("x.safetensors", bytes).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
        assert!(message.contains("x.safetensors"), "{message}");
    }

    #[test]
    fn look_alikes_are_named() {
        check(b"", "empty");
        check(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n",
            "git lfs pull",
        );
        check(b"<!DOCTYPE html><html>", "HTML");
        check(b"GGUF\x03\0\0\0", "GGUF");
        check(b"PK\x03\x04....", "zip");
        check(b"\x80\x02}q\x00....", "pickle");
        check(b"\x80\x04\x95\x10\0\0\0\0{", "pickle");
        check(b"1234", "4 bytes");
        check(b"\xff\0\0\0\0\0\0\0{}", "truncated");
        check(b"\xff\0\0\0\0\0\0\0abc", "header");
        check_safetensors("x", b"\x02\0\0\0\0\0\0\0{}").unwrap();
        // A header of 640 bytes begins as a pickle does.
        let header = format!("{{{}}}", " ".repeat(638));
        let bytes = [&640_u64.to_le_bytes()[..], header.as_bytes()].concat();
        check_safetensors("x", &bytes).unwrap();
    }
}
