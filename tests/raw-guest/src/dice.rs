//! Numbers that only seem random: the same ones in each run (xorshift64*, Vigna 2016).

/// A sequence of numbers.
pub struct Dice(u64);

impl Dice {
    /// The sequence that begins with `seed`, which is not 0.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }

    /// One of `choices`, which are not empty.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// A number that is likely to hit a bound: small, a power of two, near one, or any.
    pub fn number(&mut self) -> u64 {
        let power = 1u64 << self.below(64);
        match self.below(6) {
            0 => self.below(16),
            1 => power,
            2 => power.wrapping_sub(self.below(4)),
            3 => u64::MAX - self.below(64),
            4 => self.below(64 << 20),
            _ => self.next(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_choices_come() {
        let mut dice = Dice::new(1);
        let mut seen = [false; 4];
        for _ in 0..200 {
            seen[dice.one_of(&[0, 1, 2, 3])] = true;
        }
        assert_eq!(seen, [true; 4]);
    }
}
