//! Damage that files suffer, by accident or on purpose.

/// Numbers that look random: splitmix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0; `end` must be above that.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn of<'a, T>(&mut self, list: &'a [T]) -> &'a T {
        &list[self.below(list.len())]
    }
}

/// Where headers lie: most damage goes there.
const HEAD_BYTES: usize = 2048;
/// Longest piece that is copied or removed.
const PIECE_BYTES: usize = 64;
const NUMBERS: [u64; 14] = [
    0,
    1,
    2,
    7,
    127,
    255,
    256,
    65_535,
    1 << 31,
    u32::MAX as u64,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];
/// Numbers as texts have them.
const DIGITS: [&str; 14] = [
    "0",
    "-1",
    "1",
    "2",
    "3.5",
    "4294967296",
    "9007199254740993",
    "18446744073709551615",
    "18446744073709551616",
    "1e999",
    "-0.0",
    "null",
    "[]",
    "\"\"",
];

/// Damages `input` in one place, or in up to eight. `others` lend pieces, `words` belong to the format.
pub(crate) fn damage(input: &mut Vec<u8>, others: &[Vec<u8>], words: &[&str], random: &mut Random) {
    let places = if random.below(2) == 0 { 1 } else { 1 + random.below(8) };
    for _ in 0..places {
        one(input, others, words, random);
    }
}

fn place(input: &[u8], random: &mut Random) -> usize {
    let end = if random.below(4) == 0 { input.len() } else { input.len().min(HEAD_BYTES) };
    random.below(end.max(1))
}

fn piece(input: &[u8], random: &mut Random) -> std::ops::Range<usize> {
    let start = place(input, random).min(input.len());
    start..(start + random.below(PIECE_BYTES)).min(input.len())
}

fn one(input: &mut Vec<u8>, others: &[Vec<u8>], words: &[&str], random: &mut Random) {
    let at = place(input, random).min(input.len().saturating_sub(1));
    match random.below(11) {
        0 => input.truncate(at),
        1 | 2 if !input.is_empty() => input[at] ^= 1 << random.below(8),
        3 if !input.is_empty() => input[at] = random.next() as u8,
        4 => {
            let number = *random.of(&NUMBERS);
            let width = *random.of(&[1, 2, 4, 8]);
            let mut bytes = number.to_le_bytes()[..width].to_vec();
            if random.below(3) == 0 {
                bytes.reverse();
            }
            let end = (at + width).min(input.len());
            input[at..end].copy_from_slice(&bytes[..end - at]);
        }
        5 => drop(input.drain(piece(input, random))),
        6 => {
            let copy = input[piece(input, random)].to_vec();
            input.splice(at..at, copy);
        }
        7 if !words.is_empty() => {
            let word = random.of(words).bytes();
            let end = if random.below(2) == 0 { at } else { (at + word.len()).min(input.len()) };
            input.splice(at..end, word);
        }
        8 => number_in_text(input, at, random),
        9 => {
            let other = random.of(others);
            let copy = other[piece(other, random)].to_vec();
            let end = (at + copy.len()).min(input.len());
            input.splice(at..end, copy);
        }
        // A piece many times over: nesting, or a list that is too long.
        _ => {
            let copy = input[piece(input, random)].repeat(1 + random.below(64));
            input.splice(at..at, copy);
        }
    }
}

/// Replaces the next number that is written in digits.
fn number_in_text(input: &mut Vec<u8>, from: usize, random: &mut Random) {
    let Some(start) = input[from..].iter().position(u8::is_ascii_digit).map(|at| from + at) else {
        return;
    };
    let digits = input[start..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    input.splice(start..start + digits, random.of(&DIGITS).bytes());
}
