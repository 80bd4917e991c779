//! `pentimento doctor`: what this program sees.

use std::path::PathBuf;

use pentimento::{Device, ModelInfo, ModelSource, PlannerSource, Result, memory};
use serde_json::{Value, json};

use super::{args::DoctorArgs, places};

pub(crate) fn run(args: &DoctorArgs) -> Result<()> {
    let report = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "features": { "cuda": Device::CUDA_BUILT, "mini": cfg!(feature = "mini") },
        "devices": [device(Device::Cpu), device(Device::Cuda(0))],
        "cpu": {
            "threads": std::thread::available_parallelism().map_or(1, usize::from),
            "instructions": instructions(),
        },
        "memory": { "available_bytes": memory::available_bytes() },
        "packs": packs(args)?,
        "planner": planner(args)?,
    });
    if args.json { super::print_json(&report) } else { super::print(text(&report).as_bytes()) }
}

fn device(device: Device) -> Value {
    match device.open() {
        Ok(_) => json!({ "name": device.to_string(), "usable": true }),
        Err(error) => {
            let reason = error.to_string();
            let reason = reason.lines().next().unwrap_or_default();
            json!({ "name": device.to_string(), "usable": false, "reason": reason })
        }
    }
}

/// The vector instructions that the CPU's operations can choose from.
fn instructions() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let found = [
            ("avx2", std::arch::is_x86_feature_detected!("avx2")),
            ("fma", std::arch::is_x86_feature_detected!("fma")),
            ("avx512f", std::arch::is_x86_feature_detected!("avx512f")),
            ("avx512vnni", std::arch::is_x86_feature_detected!("avx512vnni")),
            ("avx512bf16", std::arch::is_x86_feature_detected!("avx512bf16")),
        ];
        found.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect()
    }
    #[cfg(not(target_arch = "x86_64"))]
    Vec::new()
}

/// The shipped pack, and the folder that was asked about; only the latter's faults are errors.
fn packs(args: &DoctorArgs) -> Result<Vec<Value>> {
    let mut packs = Vec::new();
    if cfg!(feature = "mini") {
        packs.push(pack("shipped with the program", &ModelInfo::read(&ModelSource::Mini)?));
    }
    if let Some(folder) = &model(args)? {
        let info = ModelInfo::read(&ModelSource::Folder(folder.clone()))?;
        packs.push(pack(&folder.display().to_string(), &info));
    }
    Ok(packs)
}

fn model(args: &DoctorArgs) -> Result<Option<PathBuf>> {
    places::model_folder("--model", &args.model, &places::places(&args.places)?)
}

/// Whether planner and text encoder are one model in memory.
fn planner(args: &DoctorArgs) -> Result<Value> {
    let source = model(args)?.map_or(ModelSource::Mini, ModelSource::Folder);
    if args.model.is_none() && !cfg!(feature = "mini") {
        return Ok(Value::Null);
    }
    let folder = places::planner_folder(&args.planner, &places::places(&args.places)?)?;
    let planner = PlannerSource { model: folder.clone(), ..PlannerSource::default() };
    Ok(json!({
        "folder": folder.as_deref().map(std::path::Path::to_string_lossy),
        "shares_text_encoder": planner.shares_text_encoder(&source)?,
    }))
}

fn pack(place: &str, info: &ModelInfo) -> Value {
    let bytes: u64 = info.parts.iter().map(|part| part.stored_bytes).sum();
    json!({
        "name": info.name, "place": place, "version": info.version, "digest": info.short_digest(),
        "stored_bytes": bytes, "untrained": info.untrained,
    })
}

fn text(report: &Value) -> String {
    let mut lines = vec![format!("pentimento {}", word(&report["version"]))];
    let yes_no = |value: &Value| if value.as_bool() == Some(true) { "yes" } else { "no" };
    lines.push(format!(
        "features  cuda: {}, mini: {}",
        yes_no(&report["features"]["cuda"]),
        yes_no(&report["features"]["mini"])
    ));
    for device in report["devices"].as_array().into_iter().flatten() {
        let name = word(&device["name"]);
        let state = device["reason"].as_str().unwrap_or("usable");
        // The reason names the device, too.
        let state = state.split_once(&format!("{name}: ")).map_or(state, |(_, why)| why);
        lines.push(format!("device    {name}: {state}"));
    }
    let instructions: Vec<&str> = report["cpu"]["instructions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    lines.push(format!(
        "cpu       {} threads; {}",
        report["cpu"]["threads"],
        instructions.join(" ")
    ));
    if let Some(bytes) = report["memory"]["available_bytes"].as_u64() {
        lines.push(format!("memory    {} available", indicatif::BinaryBytes(bytes)));
    }
    for pack in report["packs"].as_array().into_iter().flatten() {
        let untrained = if pack["untrained"] == true { ", untrained: random weights" } else { "" };
        lines.push(format!(
            "pack      {}: {} ({}), {}{untrained}, {}",
            word(&pack["name"]),
            word(&pack["version"]),
            word(&pack["digest"]),
            indicatif::BinaryBytes(pack["stored_bytes"].as_u64().unwrap_or(0)),
            word(&pack["place"]),
        ));
    }
    match report["planner"]["shares_text_encoder"].as_bool() {
        Some(true) => lines.push("planner   the text encoder, loaded once for both".to_owned()),
        Some(false) => {
            let folder = word(&report["planner"]["folder"]);
            lines.push(format!("planner   {folder}: other weights, loaded beside the editor's"));
        }
        None => {}
    }
    lines.join("\n") + "\n"
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
