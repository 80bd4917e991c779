//! The two agents at work: one model, two roles.

use crate::{
    error::{Error, RequestError, Result},
    plan::{
        coverage::{Gap, align},
        decomposition::Decomposition,
        document::{Plan, STEPS_MAX, Step},
        grammar::{decomposition_grammar, steps_grammar},
        order::ordered,
        prompts::Prompts,
    },
    vlm::{Call, Finish, GenerateOptions, Inputs, Message, Sampling, Seen, VisionLanguageModel},
};

/// How the agents write.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanOptions {
    /// The longest reply of one agent, in tokens.
    pub tokens_max: usize,
    /// 0 takes the likeliest token each time.
    pub temperature: f32,
    /// Seed of the sampling, where the temperature is above 0.
    pub seed: u64,
    /// Whether a grammar keeps replies well-formed. Off for training and for measuring how often a
    /// model keeps the format by itself.
    pub grammar: bool,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self { tokens_max: 512, temperature: 0.0, seed: 0, grammar: true }
    }
}

/// Who ordered the steps of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PlannedBy {
    /// The sequencing agent.
    Agent,
    /// The sequencing agent, after its faults were named to it.
    Repair,
    /// The documented order ([`ordered`]), after the agent failed twice.
    Rule,
}

/// A plan, and how it came about.
#[derive(Debug, Clone, PartialEq)]
pub struct Planning {
    /// The plan.
    pub plan: Plan,
    /// The decomposition agent's reply, word for word.
    pub reply: String,
    /// Who ordered the steps.
    pub planned_by: PlannedBy,
    /// Tokens that both agents wrote.
    pub tokens: usize,
}

/// A vision-language model in its two planning roles.
#[derive(Debug, Clone, Copy)]
pub struct Planner<'a> {
    /// The model.
    pub model: &'a VisionLanguageModel,
    /// What the agents are told.
    pub prompts: &'a Prompts,
    /// How they write.
    pub options: &'a PlanOptions,
    /// The decomposition agent's adapter, where it has one, and what stops both agents.
    pub call: Call<'a>,
}

/// One reply.
struct Reply {
    text: String,
    tokens: usize,
}

impl Planner<'_> {
    /// Takes a request apart and orders its steps. The vision tower runs once for both agents.
    ///
    /// # Errors
    /// A request without text, a reply that is not finished at the limit of tokens or, without
    /// the grammar, not well-formed; cancellation.
    pub fn plan(&self, pictures: &Seen, request: &str) -> Result<Planning> {
        if request.trim().is_empty() {
            return Err(Error::field(
                "prompt",
                "nothing",
                "a sentence that says what should change",
            ));
        }
        let reply = self.decompose(pictures, request)?;
        let parts = Decomposition::parse(&reply.text)
            .map_err(|fault| malformed("decomposition", &fault.to_string(), &reply.text))?;
        if parts.actions.is_empty() {
            return Err(malformed("decomposition", "no action", &reply.text));
        }
        let (steps, planned_by, tokens) = self.sequence(pictures, &parts)?;
        let plan = Plan { decomposition: Some(parts), ..Plan::new(request.trim(), steps) };
        Ok(Planning { plan, reply: reply.text, planned_by, tokens: tokens + reply.tokens })
    }

    /// The decomposition agent's reply to a request, word for word.
    ///
    /// # Errors
    /// A reply that is not finished at the limit of tokens, or cancellation.
    pub fn reply(&self, pictures: &Seen, request: &str) -> Result<String> {
        Ok(self.decompose(pictures, request)?.text)
    }

    fn decompose(&self, pictures: &Seen, request: &str) -> Result<Reply> {
        let messages = self.prompts.for_decomposition(pictures.grids().len(), request);
        self.write("decomposition", pictures, &messages, &decomposition_grammar(), self.call)
    }

    /// The ordered steps of a decomposition, who ordered them, and the tokens it took.
    fn sequence(
        &self,
        pictures: &Seen,
        parts: &Decomposition,
    ) -> Result<(Vec<Step>, PlannedBy, usize)> {
        let mut messages = self.prompts.for_sequencing(pictures.grids().len(), parts);
        // The adapter is the decomposition agent's alone.
        let plain = Call { adapter: None, ..self.call };
        let mut tokens = 0;
        for planned_by in [PlannedBy::Agent, PlannedBy::Repair] {
            let reply = match self.write("steps", pictures, &messages, &steps_grammar(), plain) {
                Err(Error::Request(RequestError::Unfinished { .. })) => break,
                reply => reply?,
            };
            tokens += reply.tokens;
            match align(parts, &numbered(&reply.text)) {
                Ok(steps) => return Ok((steps, planned_by, tokens)),
                Err(gaps) => {
                    tracing::debug!(?gaps, reply = reply.text, "the steps do not fit the request");
                    messages.push(Message::text("assistant", &reply.text));
                    messages.push(Message::text("user", &self.prompts.repair_user(&listed(&gaps))));
                }
            }
        }
        let mut steps = ordered(parts);
        steps.truncate(STEPS_MAX);
        Ok((steps, PlannedBy::Rule, tokens))
    }

    fn write(
        &self,
        what: &'static str,
        pictures: &Seen,
        messages: &[Message],
        grammar: &str,
        call: Call<'_>,
    ) -> Result<Reply> {
        let text = self.model.chat(messages)?;
        let inputs: Inputs = self.model.prepare_seen(&text, pictures)?;
        let options = self.generate_options();
        let mut constraint = match self.options.grammar {
            true => Some(self.model.constraint(grammar)?),
            false => None,
        };
        let generation = self.model.generate_within(
            &inputs,
            &options,
            constraint.as_mut(),
            call,
            &mut |_| (),
        )?;
        if generation.finish == Finish::Length {
            return Err(RequestError::Unfinished {
                what,
                tokens: generation.tokens.len(),
                produced: generation.text,
            }
            .into());
        }
        Ok(Reply { text: generation.text, tokens: generation.tokens.len() })
    }

    /// The agents neither repeat less nor sample otherwise than asked, whatever the model's makers
    /// set for conversations.
    fn generate_options(&self) -> GenerateOptions {
        let temperature = self.options.temperature;
        GenerateOptions {
            max_new_tokens: self.options.tokens_max,
            sampling: if temperature > 0.0 {
                Sampling::Random { temperature, top_k: None, top_p: 1.0 }
            } else {
                Sampling::Greedy
            },
            repetition_penalty: 1.0,
            seed: self.options.seed,
            ..self.model.generate_options()
        }
    }
}

/// The sub-requests of numbered lines, without their numbers.
fn numbered(reply: &str) -> Vec<String> {
    let text = |line: &str| {
        let rest = line.trim_start_matches(|c: char| c.is_ascii_digit());
        rest.strip_prefix('.').or(rest.strip_prefix(')')).unwrap_or(line).trim().to_owned()
    };
    reply.lines().map(str::trim).filter(|line| !line.is_empty()).map(text).collect()
}

fn listed(gaps: &[Gap]) -> String {
    let lines: Vec<String> = gaps.iter().map(|gap| format!("- {gap}")).collect();
    lines.join("\n")
}

fn malformed(what: &'static str, reason: &str, reply: &str) -> Error {
    let (reason, reply) = (reason.to_owned(), reply.to_owned());
    RequestError::Malformed { what, reason, reply }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_not_part_of_a_step() {
        let reply = "1. remove the car\n2) paint 3 houses\n\n 10.  dim the light \nno number";
        let expected = ["remove the car", "paint 3 houses", "dim the light", "no number"];
        assert_eq!(numbered(reply), expected);
    }
}
