//! How words are compared: after NFKC, in lower case, without outer and doubled spaces.

use unicode_normalization::UnicodeNormalization;

/// The form in which items are compared.
pub(super) fn normalized(text: &str) -> String {
    let text: String = text.nfkc().flat_map(char::to_lowercase).collect();
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Where `words` stand in `text`, both normalized, as whole words where letters of one script would
/// otherwise run on. Scripts written without spaces have no word ends, so there any place counts.
pub(super) fn find_words(text: &str, words: &str) -> Option<usize> {
    let runs_on = |a: Option<char>, b: Option<char>| match (a, b) {
        (Some(a), Some(b)) => is_spaced(a) && is_spaced(b),
        _ => false,
    };
    let free = |at: usize| {
        let (before, after) = (&text[..at], &text[at + words.len()..]);
        !runs_on(before.chars().next_back(), words.chars().next())
            && !runs_on(words.chars().next_back(), after.chars().next())
    };
    if words.is_empty() {
        return None;
    }
    text.match_indices(words).map(|(at, _)| at).find(|&at| free(at))
}

/// Letters and digits of scripts that put spaces between words: everything before the East Asian
/// blocks.
fn is_spaced(c: char) -> bool {
    c.is_alphanumeric() && u32::from(c) < 0x2e80
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_compared_without_case_width_and_spaces() {
        assert_eq!(normalized("  Scarlet \u{3000} RED\n"), "scarlet red");
        assert_eq!(normalized("ＡＢＣ１"), "abc1");
        assert_eq!(normalized("ﬁne ÄÖ"), "fine äö");
    }

    #[test]
    fn words_are_found_whole() {
        assert_eq!(find_words("remove the car", "car"), Some(11));
        assert_eq!(find_words("remove the cart", "car"), None);
        assert_eq!(find_words("the scar and the car", "car"), Some(17));
        assert_eq!(find_words("把房子涂成蓝色", "房子"), Some(3));
        assert_eq!(find_words("die häuser", "haus"), None);
        assert_eq!(find_words("x", ""), None);
    }
}
