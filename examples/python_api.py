"""The whole job from Python, on a network and images that ship with bitwright.

python examples/python_api.py
"""

import bitwright as bw


def main(folder: str = "run", test: str = "zoo:fashion-test[:2000]") -> None:
    """Quantizes, measures, saves, loads and exports."""
    quantized = bw.quantize("zoo:fashion_cnn", "zoo:fashion", weights=4, activations=8)
    print(quantized.evaluate(test))
    quantized.save(folder, force=True)
    parity = quantized.export(f"{folder}/model.onnx")
    print(f"ONNX Runtime gives the same answer on {parity.agreement:.1%} of {parity.images} images.")
    again = bw.load(folder)
    print(again(quantized.calibration.batch([0, 1])).argmax(1))


if __name__ == "__main__":
    main()
