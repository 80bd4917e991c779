//! Chat messages to the text that the model was trained on.

use std::collections::BTreeMap;

use minijinja::{Environment, ErrorKind, Value as JinjaValue, syntax::SyntaxConfig, value::Serde};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    error::{Error, Result},
    weights::ModelFiles,
};

/// What a folder without a template gets: ChatML as Qwen2.5-VL was trained with.
const CHATML: &str = "\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\n' }}
{%- endif -%}";
/// Steps that a template may take; one also pays for 64 bytes of text that it makes. A conversation
/// takes some thousands.
const FUEL: u64 = 1_000_000;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What is said and shown, in order.
    #[serde(serialize_with = "content")]
    pub content: Vec<Part>,
}

/// A piece of a turn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Part {
    /// Text.
    Text {
        /// The text.
        text: String,
    },
    /// The next picture.
    Image,
}

impl Message {
    /// A turn of text alone.
    #[must_use]
    pub fn text(role: &str, text: &str) -> Self {
        Self { role: role.to_owned(), content: vec![Part::Text { text: text.to_owned() }] }
    }

    /// A user's turn: `pictures` pictures, then text.
    #[must_use]
    pub fn user(pictures: usize, text: &str) -> Self {
        let mut message = Self::text("user", text);
        message.content.splice(0..0, std::iter::repeat_n(Part::Image, pictures));
        message
    }
}

/// Text alone is given to templates as a string, which all of them take.
fn content<S: serde::Serializer>(parts: &[Part], serializer: S) -> Result<S::Ok, S::Error> {
    match parts {
        [Part::Text { text }] => text.serialize(serializer),
        parts => parts.serialize(serializer),
    }
}

#[derive(Deserialize)]
struct Holder {
    #[serde(default)]
    chat_template: Option<Templates>,
}

/// One template, or several by name.
#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// A chat template, parsed.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    path: String,
}

/// Path and text of the template of the first of `folders` that has one.
///
/// # Errors
/// A file that is damaged.
pub(super) fn text(files: &ModelFiles, folders: &[&str]) -> Result<Option<(String, String)>> {
    for folder in folders {
        let path = format!("{folder}/chat_template.jinja");
        if files.exists(&path) {
            let text = files.read_text(&path)?.into_owned();
            return Ok(Some((path, text)));
        }
        for name in ["chat_template.json", "tokenizer_config.json"] {
            let path = format!("{folder}/{name}");
            if files.exists(&path)
                && let Some(text) = from_json(files, &path)?
            {
                return Ok(Some((path, text)));
            }
        }
    }
    Ok(None)
}

impl ChatTemplate {
    /// The template of the first of `folders` that has one, in `chat_template.jinja`,
    /// `chat_template.json` or `tokenizer_config.json`; ChatML when none has.
    ///
    /// # Errors
    /// A file that is damaged or a template that cannot be parsed.
    pub fn load(files: &ModelFiles, folders: &[&str]) -> Result<Self> {
        match text(files, folders)? {
            Some((path, template)) => Self::parse(files, &path, template),
            None => Self::parse(files, "built-in ChatML", CHATML.to_owned()),
        }
    }

    fn parse(files: &ModelFiles, path: &str, template: String) -> Result<Self> {
        let refused =
            |error: &minijinja::Error| files.corrupt(path, &error.to_string(), "a chat template");
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| refused(&error))?);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| {
            Err::<JinjaValue, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned("chat", template).map_err(|error| refused(&error))?;
        Ok(Self { environment, path: path.to_owned() })
    }

    /// The text of a conversation, ending where the model is to answer.
    ///
    /// # Errors
    /// Messages that the template refuses.
    pub fn render(&self, messages: &[Message]) -> Result<String> {
        let refused = |error: minijinja::Error| {
            let expected = format!("a conversation that the template of {} accepts", self.path);
            Error::field("messages", error, expected)
        };
        let template = self.environment.get_template("chat").map_err(refused)?;
        let context = BTreeMap::from([
            ("messages", JinjaValue::from(Serde(messages))),
            ("add_generation_prompt", JinjaValue::from(true)),
        ]);
        template.render(context).map_err(refused)
    }
}

/// The `chat_template` of a JSON file, or the one named `default`.
fn from_json(files: &ModelFiles, path: &str) -> Result<Option<String>> {
    let json: Value = files.read_json(path)?;
    let holder: Holder = serde_json::from_value(json).map_err(|error| {
        files.corrupt(
            path,
            &error.to_string(),
            "a chat template as a string or a list of named ones",
        )
    })?;
    match holder.chat_template {
        None => Ok(None),
        Some(Templates::One(template)) => Ok(Some(template)),
        Some(Templates::Named(list)) => {
            let default = list.into_iter().find(|entry| entry.name == "default");
            let found = || files.corrupt(path, "named chat templates", "one named default");
            default.map(|entry| Some(entry.template)).ok_or_else(found)
        }
    }
}
