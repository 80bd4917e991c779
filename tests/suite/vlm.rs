//! The vision-language model against the reference.

use candle_core::{DType, Tensor};
use image::RgbImage;
use pentimento::{
    CancelToken,
    vlm::{GenerateOptions, Inputs, VisionLanguageModel},
    weights::{ModelFiles, Precision},
};

use crate::common::{Reference, Tolerance, assert_close};

const SHARE: Tolerance = Tolerance::Relative(1e-4);

fn open(case: &Reference) -> VisionLanguageModel {
    let files = ModelFiles::Folder(case.folder.clone());
    VisionLanguageModel::load(&files, "text_encoder", &Precision::reference()).unwrap()
}

fn picture(case: &Reference, name: &str) -> RgbImage {
    image::open(case.folder.join("cases").join(name)).unwrap().into_rgb8()
}

fn fact<'a>(case: &'a Reference, name: &str) -> &'a str {
    case.facts[name].as_str().unwrap()
}

fn tokens(inputs: &Inputs) -> Vec<i64> {
    inputs.tokens().iter().map(|token| i64::from(*token)).collect()
}

#[test]
fn one_picture_equals_the_reference() {
    for case in Reference::all() {
        let (model, cancel) = (open(&case), CancelToken::new());
        let inputs = model.prepare(fact(&case, "vl.text"), &[picture(&case, "vl.png")]).unwrap();
        let name = |what: &str| format!("{} vl.{what}", case.name());
        assert_eq!(tokens(&inputs), case.ints("vl.input_ids"), "{}", name("input_ids"));
        let patches = inputs.patches().unwrap();
        let grid = patches.grids[0];
        let grid = [1, grid.height as i64, grid.width as i64];
        assert_eq!(grid.as_slice(), case.ints("vl.image_grid_thw"));
        let pixels = case.tensor("vl.pixel_values");
        assert_close(
            &name("pixel_values"),
            &patches.pixel_values,
            pixels,
            Tolerance::Absolute(1e-5),
        );
        let positions = &inputs.positions().tokens;
        let by_axis: Vec<i64> =
            (0..3).flat_map(|axis| positions.iter().map(move |p| i64::from(p[axis]))).collect();
        assert_eq!(by_axis, case.ints("vl.position_ids"), "{}", name("position_ids"));
        assert_eq!(vec![inputs.positions().delta()], case.ints("vl.rope_delta"));
        let vision = model.vision_embeddings(&inputs, &cancel).unwrap().unwrap();
        assert_close(&name("vision_embeds"), &vision, case.tensor("vl.vision_embeds"), SHARE);
        let hidden = model.hidden_states(&inputs, &cancel).unwrap();
        assert_close(&name("hidden_last"), &hidden, case.tensor("vl.hidden_last"), SHARE);
        let logits = model.logits(&inputs, &cancel).unwrap();
        assert_close(&name("logits"), &logits, case.tensor("vl.logits"), SHARE);
        let options = GenerateOptions { max_new_tokens: 24, ..model.generate_options() };
        let answer = model.generate(&inputs, &options, &cancel, &mut |_| ()).unwrap();
        let greedy: Vec<i64> = answer.tokens.iter().map(|token| i64::from(*token)).collect();
        assert_eq!(greedy, case.ints("vl.greedy"), "{}", name("greedy"));
    }
}
