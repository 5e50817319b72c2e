package dev.kd_dist.student;

import android.content.Context;
@java_import@
import java.io.IOException;
@java_util_import@
import org.pytorch.IValue;
import org.pytorch.Module;
import org.pytorch.Tensor;

/**
 * The student on PyTorch Mobile, for apps that have it already. It is retired: its last version is 2.1.0 of October
 * 2023, which may not know every operation of a file that PyTorch @torch_version@ wrote. Try the golden vectors on it
 * first; a new app takes ExecuTorch or ONNX Runtime.
 *
 * <p>build.gradle.kts: minSdk = 21 and implementation("org.pytorch:pytorch_android:2.1.0"), not pytorch_android_lite,
 * which reads files of another kind. The file itself goes to app/src/main/assets.
 *
 * <p>Make one of these and keep it, and call it from one background thread: loading and running take time.
 *
 * <p>@note@
 */
public final class TorchScriptExample implements AutoCloseable {
    private final Module module;

    public TorchScriptExample(Context context) throws IOException {
        String path = AssetFile.path(context, StudentInfo.TORCHSCRIPT_FILE, StudentInfo.TORCHSCRIPT_SHA256);
        module = Module.load(path);
    }

    /** @returns@ */
    public @java_type@ @method@(@java_argument@) {
@java_input@
        Tensor tensor = Tensor.fromBlob(input, StudentInfo.INPUT_SHAPE);
        float[] output = module.forward(IValue.from(tensor)).toTensor().getDataAsFloatArray();
        return @result@;
    }

    @Override
    public void close() {
        module.destroy();
    }
}
