//! Folders that are damaged or hold another model.

use candle_core::{DType, Device, Tensor};
use pentimento::{
    CancelToken, Error, ModelError,
    diffusion::{
        Denoise, DiffusionModel,
        qwen_image::{ModelInput, Outputs},
    },
    weights::{ModelFiles, Precision},
};

use super::{Run, Tensors, conditioning, grids, largest_difference, vector};
use crate::common::Reference;

/// A copy of a checkpoint's diffusion parts that a test may damage.
struct Copy(tempfile::TempDir);

impl Copy {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = Reference::open("tiny-qwen-edit").folder;
        for part in ["transformer", "vae", "scheduler"] {
            fs_err::create_dir(folder.path().join(part)).unwrap();
            for entry in fs_err::read_dir(source.join(part)).unwrap() {
                let entry = entry.unwrap();
                fs_err::copy(entry.path(), folder.path().join(part).join(entry.file_name()))
                    .unwrap();
            }
        }
        Self(folder)
    }

    fn set(self, file: &str, field: &str, value: serde_json::Value) -> Self {
        let path = self.0.path().join(file);
        let text = fs_err::read_to_string(&path).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        config[field] = value;
        fs_err::write(&path, config.to_string()).unwrap();
        self
    }

    fn change_tensors(self, part: &str, change: impl FnOnce(&mut Tensors)) -> Self {
        let path = self.0.path().join(part).join("diffusion_pytorch_model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, &path).unwrap();
        self
    }

    fn load(&self) -> pentimento::Result<DiffusionModel> {
        let files = ModelFiles::Folder(self.0.path().to_owned());
        DiffusionModel::load(&files, &Precision::reference())
    }

    #[track_caller]
    fn fault(&self) -> ModelError {
        match self.load() {
            Err(Error::Model(error)) => error,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("the damage was not seen"),
        }
    }
}

#[test]
fn configs_that_do_not_fit_are_refused_with_the_field() {
    let (transformer, vae) = ("transformer/config.json", "vae/config.json");
    for (file, field, value) in [
        (transformer, "guidance_embeds", serde_json::json!(true)),
        (transformer, "use_additional_t_cond", serde_json::json!(true)),
        (transformer, "use_layer3d_rope", serde_json::json!(true)),
        (transformer, "axes_dims_rope", serde_json::json!([4, 6, 8])),
        (transformer, "axes_dims_rope", serde_json::json!([5, 5, 6])),
        (transformer, "axes_dims_rope", serde_json::json!([16])),
        (transformer, "patch_size", serde_json::json!(1)),
        (transformer, "out_channels", serde_json::json!(null)),
        (transformer, "out_channels", serde_json::json!(32)),
        (transformer, "num_layers", serde_json::json!(0)),
        (transformer, "num_attention_heads", serde_json::json!(usize::MAX)),
        (transformer, "window_size", serde_json::json!(8)),
        (vae, "attn_scales", serde_json::json!([0.5])),
        (vae, "dim_mult", serde_json::json!([1])),
        (vae, "temperal_downsample", serde_json::json!([true])),
        (vae, "latents_mean", serde_json::json!([0.0])),
        (vae, "latents_std", serde_json::json!(vec![0.0; 16])),
        (vae, "input_channels", serde_json::json!(4)),
        (vae, "base_dim", serde_json::json!(0)),
        (vae, "scale_factor_spatial", serde_json::json!(16)),
    ] {
        match Copy::new().set(file, field, value.clone()).fault() {
            ModelError::Config { path, field: found, .. } => {
                assert_eq!(found, field);
                assert!(path.ends_with(file), "{path}");
            }
            other => panic!("{field} = {value}: {other}"),
        }
    }
    for (file, class) in
        [(transformer, "FluxTransformer2DModel"), (vae, "AutoencoderKL"), (vae, "AutoencoderKLWan")]
    {
        let error = Copy::new().set(file, "_class_name", serde_json::json!(class)).fault();
        assert!(matches!(&error, ModelError::Kind { found, .. } if found == class), "{error}");
    }
    // Older files carry a width that nothing uses.
    Copy::new().set(transformer, "pooled_projection_dim", 768.into()).load().unwrap();
}

#[test]
fn parts_of_different_models_are_refused() {
    let mut copy = Copy::new();
    for (field, value) in [("in_channels", 32), ("out_channels", 8)] {
        copy = copy.set("transformer/config.json", field, value.into());
    }
    let copy = copy.change_tensors("transformer", |tensors| {
        for name in ["img_in.weight", "proj_out.weight", "proj_out.bias"] {
            let axis = usize::from(name == "img_in.weight");
            let half = tensors[name].narrow(axis, 0, 32).unwrap().contiguous().unwrap();
            tensors.insert(name.to_owned(), half);
        }
    });
    let error = copy.fault();
    assert!(matches!(&error, ModelError::Config { field, .. } if field == "z_dim"), "{error}");
}

#[test]
fn tensors_that_do_not_fit_are_refused_with_their_names() {
    let name = "transformer_blocks.1.attn.to_k.weight";
    let copy = Copy::new().change_tensors("transformer", |tensors| {
        tensors.remove(name).unwrap();
    });
    let error = copy.fault();
    assert!(
        matches!(&error, ModelError::TensorMissing { tensor, .. } if tensor == name),
        "{error}"
    );

    let copy = Copy::new().change_tensors("transformer", |tensors| {
        let narrow = tensors[name].narrow(0, 0, 8).unwrap();
        tensors.insert(name.to_owned(), narrow);
    });
    let error = copy.fault();
    assert!(
        matches!(&error, ModelError::TensorShape { tensor, found, .. } if tensor == name && found[0] == 8),
        "{error}"
    );

    for (part, extra) in [("transformer", "extra.weight"), ("vae", "encoder.extra.weight")] {
        let copy = Copy::new().change_tensors(part, |tensors| {
            tensors.insert(extra.to_owned(), vector(&[1.0]));
        });
        let error = copy.fault();
        assert!(
            matches!(&error, ModelError::TensorsUnused { names, .. } if names == extra),
            "{error}"
        );
    }

    let kernel = "decoder.up_blocks.0.resnets.0.conv1.weight";
    let copy = Copy::new().change_tensors("vae", |tensors| {
        let flat = tensors[kernel].narrow(2, 2, 1).unwrap().contiguous().unwrap();
        tensors.insert(kernel.to_owned(), flat);
    });
    let error = copy.fault();
    assert!(
        matches!(&error, ModelError::TensorShape { tensor, .. } if tensor == kernel),
        "{error}"
    );
}

#[test]
fn models_that_look_alike_are_refused_by_name() {
    for (tensor, model) in [
        ("time_text_embed.addition_t_embedding.weight", "Qwen-Image-Layered"),
        ("transformer_blocks.0.img_mlp.w1.weight", "Boogu"),
        ("single_transformer_blocks.0.attn.to_q.weight", "FLUX"),
        ("transformer_blocks.0.img_mlp.gate_up.weight", "Qwen-Image-2.1"),
        ("transformer_blocks.0.img_mlp.gate_layer.weight", "Qwen-Image-2.1"),
    ] {
        let copy = Copy::new().change_tensors("transformer", |tensors| {
            tensors.insert(format!("model.diffusion_model.{tensor}"), vector(&[0.0]));
        });
        let error = copy.fault();
        assert!(
            matches!(&error, ModelError::Kind { found, .. } if found.starts_with(model)),
            "{error}"
        );
    }
    let copy = Copy::new().change_tensors("transformer", |tensors| {
        let wide = Tensor::zeros((48, 128), DType::F32, &Device::Cpu).unwrap();
        tensors.insert("img_in.weight".to_owned(), wide);
    });
    let error = copy.fault();
    assert!(
        matches!(&error, ModelError::Kind { found, .. } if found.starts_with("Mage")),
        "{error}"
    );
}

#[test]
fn names_with_a_prefix_and_the_mark_of_2511_are_understood() {
    let output = |model: &DiffusionModel| {
        let reference = Reference::open("tiny-qwen-edit");
        let (grids, conditioning) = (grids(&reference), conditioning(&reference));
        let tokens = reference.tensor("dit.hidden_states");
        let input = ModelInput { tokens, grids: &grids, conditioning: &conditioning };
        let context = &model.transformer().contexts(&[0.37], &CancelToken::new()).unwrap()[0];
        model.transformer().forward(&input, context, Outputs::All, &CancelToken::new()).unwrap()
    };
    let plain = output(&Copy::new().load().unwrap());
    for prefix in ["transformer.", "diffusion_model.", "model.diffusion_model."] {
        let copy = Copy::new().change_tensors("transformer", |tensors| {
            *tensors = tensors.drain().map(|(name, x)| (format!("{prefix}{name}"), x)).collect();
        });
        assert!(largest_difference(&plain, &output(&copy.load().unwrap())) == 0.0, "{prefix}");
    }
    let marked = Copy::new().change_tensors("transformer", |tensors| {
        tensors.insert("__index_timestep_zero__".to_owned(), vector(&[0.0]));
    });
    let marked = marked.load().unwrap();
    assert!(marked.transformer().config().zero_cond_t);
    assert!(largest_difference(&plain, &output(&marked)) > 1e-3);
}

#[test]
fn not_a_number_in_the_weights_is_an_error() {
    let run = Run::open("edit-23", "pipe.cfg");
    let copy = Copy::new().change_tensors("transformer", |tensors| {
        let name = "transformer_blocks.2.img_mlp.net.2.bias";
        let nan = (&tensors[name] * f64::NAN).unwrap();
        tensors.insert(name.to_owned(), nan);
    });
    let model = copy.load().unwrap();
    let positive = run.conditioning("positive").unwrap();
    let grids = run.grids();
    let schedule = model.schedule().schedule(8, grids[0].tokens()).unwrap();
    let denoise = Denoise {
        noise: &run.inputs["noise"],
        references: Some(&run.inputs["references"]),
        grids: &grids,
        positive: &positive,
        negative: None,
        cfg_scale: 1.0,
        schedule: &schedule,
    };
    let mut finished = 0;
    let error = denoise
        .run(model.transformer(), &(), &CancelToken::new(), &mut |_, _| finished += 1)
        .unwrap_err();
    assert!(matches!(error, Error::NotFinite { stage: "denoising", .. }), "{error}");
    assert_eq!(finished, 0, "the first step must tell");
}
