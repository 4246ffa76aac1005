//! The syntax of GRUB's scripts, as far as grub.cfg has it: words, commands with a block, `if`. Loops are read, and left out.

use std::rc::Rc;
use thiserror::Error;

/// The largest script in bytes.
pub(crate) const MAX_BYTES: usize = 1 << 20;
/// How deeply blocks may be in each other. grub-mkconfig nests four.
const MAX_DEPTH: usize = 32;

/// Why a script cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum SyntaxError {
    /// It is too large.
    #[error("it has more than {MAX_BYTES} bytes")]
    TooLarge,
    /// Blocks in blocks in blocks.
    #[error("line {0}: more than {MAX_DEPTH} blocks are in each other")]
    TooDeep(usize),
    /// A quote without an end.
    #[error("line {0}: the quote has no end")]
    Quote(usize),
    /// A word is missing: `fi`, `}` and the like.
    #[error("line {line}: {expected} is missing")]
    Missing {
        /// The line where it was expected, from 1.
        line: usize,
        /// The keyword or brace that is missing.
        expected: &'static str,
    },
}

/// A part of a word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// As it is.
    Text(String),
    /// The value of a variable. Without quotes it is several words if it has spaces.
    Variable {
        /// The variable's name.
        name: String,
        /// True within double quotes.
        quoted: bool,
    },
}

/// A word: its parts, one after the other.
pub(super) type Word = Vec<Piece>;

/// A statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Statement {
    /// A command with its arguments, and the block of a menuentry or submenu.
    Command {
        /// The name of the command, and its arguments.
        words: Vec<Word>,
        /// The block behind them. It is run later, when the text that it is of may be gone.
        block: Option<Rc<[Statement]>>,
    },
    /// The first branch whose condition holds, or else the last.
    If {
        /// Conditions, each with what is done if it holds.
        branches: Vec<(Vec<Statement>, Vec<Statement>)>,
        /// What is done if none holds.
        otherwise: Vec<Statement>,
    },
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word {
        word: Word,
        /// The text, if nothing in it was quoted: such words can be reserved ones.
        plain: Option<String>,
    },
    /// `;`, or the end of a line.
    End,
}

/// Reads a script.
///
/// # Errors
/// [`SyntaxError`].
pub(super) fn parse(script: &str) -> Result<Vec<Statement>, SyntaxError> {
    if script.len() > MAX_BYTES {
        return Err(SyntaxError::TooLarge);
    }
    let tokens = Lexer { rest: script.chars().peekable(), line: 1 }.tokens()?;
    let mut parser = Parser { tokens, at: 0, depth: 0 };
    let mut statements = Vec::new();
    // A word such as `fi` in the wrong place is left out.
    while parser.at < parser.tokens.len() {
        statements.extend(parser.list(&[])?);
        parser.at += 1;
    }
    Ok(statements)
}

struct Lexer<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    line: usize,
}

impl Lexer<'_> {
    fn next(&mut self) -> Option<char> {
        let next = self.rest.next();
        self.line += usize::from(next == Some('\n'));
        next
    }

    /// Tokens with their lines.
    fn tokens(mut self) -> Result<Vec<(usize, Token)>, SyntaxError> {
        let mut tokens = Vec::new();
        while let Some(next) = self.rest.peek().copied() {
            let line = self.line;
            match next {
                '\n' | ';' => {
                    self.next();
                    tokens.push((line, Token::End));
                }
                '#' => while self.rest.next_if(|next| *next != '\n').is_some() {},
                space if space.is_whitespace() => {
                    self.next();
                }
                _ => {
                    if let Some(token) = self.word()? {
                        tokens.push((line, token));
                    }
                }
            }
        }
        Ok(tokens)
    }

    fn word(&mut self) -> Result<Option<Token>, SyntaxError> {
        let (mut word, mut text, mut plain) = (Word::new(), String::new(), true);
        let mut some = false;
        while let Some(next) = self.rest.peek().copied() {
            if next.is_whitespace() || next == ';' {
                break;
            }
            self.next();
            some = true;
            match next {
                '\\' => match self.next() {
                    // The line goes on.
                    Some('\n') => some = plain && !(word.is_empty() && text.is_empty()),
                    escaped => {
                        plain = false;
                        text.extend(escaped);
                    }
                },
                '\'' => {
                    plain = false;
                    self.quoted('\'', &mut word, &mut text)?;
                }
                '"' => {
                    plain = false;
                    self.quoted('"', &mut word, &mut text)?;
                }
                '$' => {
                    plain = false;
                    self.variable(false, &mut word, &mut text);
                }
                other => text.push(other),
            }
        }
        if !some && plain {
            return Ok(None);
        }
        let plain = plain.then(|| text.clone());
        if !text.is_empty() || word.is_empty() {
            word.push(Piece::Text(text));
        }
        Ok(Some(Token::Word { word, plain }))
    }

    /// Reads on to the closing quote.
    fn quoted(&mut self, quote: char, word: &mut Word, text: &mut String) -> Result<(), SyntaxError> {
        let line = self.line;
        loop {
            match self.next().ok_or(SyntaxError::Quote(line))? {
                next if next == quote => return Ok(()),
                '$' if quote == '"' => self.variable(true, word, text),
                '\\' if quote == '"' => match self.next().ok_or(SyntaxError::Quote(line))? {
                    '\n' => {}
                    escaped @ ('"' | '\\' | '$') => text.push(escaped),
                    other => text.extend(['\\', other]),
                },
                other => text.push(other),
            }
        }
    }

    /// Reads the name behind a `$`.
    fn variable(&mut self, quoted: bool, word: &mut Word, text: &mut String) {
        let braces = self.rest.next_if_eq(&'{').is_some();
        let mut name = String::new();
        while let Some(next) = self.rest.next_if(|next| next.is_ascii_alphanumeric() || *next == '_') {
            name.push(next);
        }
        // $? and the like.
        if name.is_empty() && !braces {
            name.extend(self.rest.next_if(|next| matches!(next, '?' | '@' | '*' | '#')));
        }
        if braces {
            while self.rest.next_if(|next| !matches!(next, '}' | '\n' | '"')).is_some() {}
            self.rest.next_if_eq(&'}');
        }
        if name.is_empty() && !braces {
            return text.push('$');
        }
        if !text.is_empty() {
            word.push(Piece::Text(std::mem::take(text)));
        }
        word.push(Piece::Variable { name, quoted });
    }
}

/// Words that end a list of statements.
const CLOSING: [&str; 8] = ["then", "elif", "else", "fi", "do", "done", "}", "in"];

struct Parser {
    tokens: Vec<(usize, Token)>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn line(&self) -> usize {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(line, _)| *line)
    }

    /// The reserved or other plain word that is next.
    fn plain(&self) -> Option<&str> {
        match self.tokens.get(self.at) {
            Some((_, Token::Word { plain: Some(plain), .. })) => Some(plain),
            _ => None,
        }
    }

    fn require(&mut self, expected: &'static str) -> Result<(), SyntaxError> {
        if self.plain() == Some(expected) {
            self.at += 1;
            return Ok(());
        }
        Err(SyntaxError::Missing { line: self.line(), expected })
    }

    /// Statements until one of `ends`, which stays; at the top until anything that ends a list, or the script's end.
    fn list(&mut self, ends: &[&'static str]) -> Result<Vec<Statement>, SyntaxError> {
        let line = self.line();
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(SyntaxError::TooDeep(line));
        }
        let mut statements = Vec::new();
        while let Some((_, token)) = self.tokens.get(self.at) {
            if *token == Token::End {
                self.at += 1;
                continue;
            }
            match self.plain() {
                Some(word) if ends.contains(&word) || CLOSING.contains(&word) && ends.is_empty() => break,
                Some("if") => statements.push(self.condition()?),
                Some("while" | "until" | "for") => self.skip_loop()?,
                Some("function") => {
                    self.command()?;
                }
                _ => statements.push(self.command()?),
            }
        }
        self.depth -= 1;
        Ok(statements)
    }

    fn condition(&mut self) -> Result<Statement, SyntaxError> {
        let mut branches = Vec::new();
        loop {
            // Behind `if` or `elif`.
            self.at += 1;
            let condition = self.list(&["then"])?;
            self.require("then")?;
            branches.push((condition, self.list(&["elif", "else", "fi"])?));
            if self.plain() != Some("elif") {
                break;
            }
        }
        let mut otherwise = Vec::new();
        if self.plain() == Some("else") {
            self.at += 1;
            otherwise = self.list(&["fi"])?;
        }
        self.require("fi")?;
        Ok(Statement::If { branches, otherwise })
    }

    fn skip_loop(&mut self) -> Result<(), SyntaxError> {
        self.at += 1;
        self.list(&["do"])?;
        self.require("do")?;
        self.list(&["done"])?;
        self.require("done")
    }

    fn command(&mut self) -> Result<Statement, SyntaxError> {
        let mut words = Vec::new();
        let has_block = matches!(self.plain(), Some("menuentry" | "submenu" | "function"));
        while let Some((_, Token::Word { word, plain })) = self.tokens.get(self.at) {
            if has_block && plain.as_deref() == Some("{") {
                self.at += 1;
                let block = self.list(&["}"])?;
                self.require("}")?;
                return Ok(Statement::Command { words, block: Some(block.into()) });
            }
            words.push(word.clone());
            self.at += 1;
        }
        Ok(Statement::Command { words, block: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Word {
        vec![Piece::Text(text.into())]
    }

    fn command(words: &[&str]) -> Statement {
        Statement::Command { words: words.iter().map(|word| text(word)).collect(), block: None }
    }

    #[test]
    fn words_are_quoted_as_in_a_shell() {
        let parsed = parse("a 'b c' \"d \\\" e\" f\\ g # h\ni \\\n j;k ''").expect("a script");
        assert_eq!(parsed, [command(&["a", "b c", "d \" e", "f g"]), command(&["i", "j"]), command(&["k", ""])]);
        let parsed = parse("x$a\"${b} c\"'$d'$").expect("a script");
        let Statement::Command { words, .. } = &parsed[0] else { panic!("a command") };
        let variable = |name: &str, quoted| Piece::Variable { name: name.into(), quoted };
        let t = |text: &str| Piece::Text(text.into());
        assert_eq!(words[0], [t("x"), variable("a", false), variable("b", true), t(" c$d$")]);
    }

    #[test]
    fn blocks_and_conditions_are_in_each_other() {
        let parsed = parse(
            "if [ a ] ; then\n b\nelif c; then d; else e; fi\nsubmenu 's' {\n menuentry x { linux y; }\n}\n\
             function f { g; }\nfor i in 1 2; do h; done\nz }",
        )
        .expect("a script");
        let branches = vec![
            (vec![command(&["[", "a", "]"])], vec![command(&["b"])]),
            (vec![command(&["c"])], vec![command(&["d"])]),
        ];
        assert_eq!(parsed[0], Statement::If { branches, otherwise: vec![command(&["e"])] });
        let entry = Statement::Command {
            words: vec![text("menuentry"), text("x")],
            block: Some([command(&["linux", "y"])].into()),
        };
        assert_eq!(
            parsed[1],
            Statement::Command { words: vec![text("submenu"), text("s")], block: Some([entry].into()) }
        );
        assert_eq!(parsed[2], command(&["z", "}"]));
        assert_eq!(parsed.len(), 3);
    }

    #[test]
    fn what_has_no_end_is_refused() {
        assert_eq!(parse("a\n'b"), Err(SyntaxError::Quote(2)));
        assert_eq!(parse("if a; then b"), Err(SyntaxError::Missing { line: 1, expected: "fi" }));
        assert_eq!(parse("menuentry a {\n\nb"), Err(SyntaxError::Missing { line: 3, expected: "}" }));
        assert!(matches!(parse(&"if ".repeat(40)), Err(SyntaxError::TooDeep(1))));
        assert_eq!(parse(&" ".repeat(MAX_BYTES + 1)), Err(SyntaxError::TooLarge));
        // Words in the wrong place are no reason not to boot.
        assert_eq!(parse("fi; }\na").expect("a script"), [command(&["a"])]);
    }
}
