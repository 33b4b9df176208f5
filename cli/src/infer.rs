//! `sensorium infer`: one question to a served model.

use std::fmt::Write as _;

use sensorium_proto::multimodal::InferResponse;

use crate::args::InferArgs;
use crate::client::Client;
use crate::error::Error;
use crate::output;

/// Asks, and prints the answers.
///
/// # Errors
/// When the image cannot be read, or the server cannot be reached or refuses.
pub async fn run(args: &InferArgs) -> Result<(), Error> {
    let image = std::fs::read(&args.image).map_err(Error::io("read", &args.image))?;
    let mut client = Client::connect(&args.addr).await?;
    let response = client.ask(&args.model, image, &args.text, args.top).await?;
    output::print(&if args.json { json(&response) } else { text(&response) })
}

/// `blue  0.99`, one line per answer.
fn text(response: &InferResponse) -> String {
    let width = response.answers.iter().map(|answer| answer.text.chars().count()).max().unwrap_or(0);
    response.answers.iter().fold(String::new(), |mut text, answer| {
        let _ = writeln!(text, "{:width$}  {:.4}", answer.text, answer.score);
        text
    })
}

fn json(response: &InferResponse) -> String {
    let answers: Vec<_> = response
        .answers
        .iter()
        // As decimal text, or the f32 would be printed with the digits of its f64 neighbour.
        .map(|answer| serde_json::json!({ "answer": answer.text, "score": crate::text::widen(answer.score) }))
        .collect();
    let value = serde_json::json!({ "model": response.model, "digest": response.model_digest, "answers": answers });
    format!("{value}\n")
}

#[cfg(test)]
mod tests {
    use sensorium_proto::multimodal::Answer;

    use super::*;

    fn response() -> InferResponse {
        let answer = |text: &str, score| Answer { text: text.to_owned(), score };
        InferResponse {
            model: "vqa".to_owned(),
            model_digest: "sha256:00".to_owned(),
            answers: vec![answer("blue", 0.99), answer("rectangle", 0.01)],
            ..InferResponse::default()
        }
    }

    #[test]
    fn answers_are_printed_best_first_in_columns() {
        assert_eq!(text(&response()), "blue       0.9900\nrectangle  0.0100\n");
    }

    #[test]
    fn json_has_the_model_its_digest_and_every_answer() {
        let value: serde_json::Value = serde_json::from_str(&json(&response())).unwrap();
        let expected = serde_json::json!({
            "model": "vqa",
            "digest": "sha256:00",
            "answers": [{ "answer": "blue", "score": 0.99 }, { "answer": "rectangle", "score": 0.01 }],
        });
        assert_eq!(value, expected);
    }
}
