package dev.kd_dist.student;

import android.content.Context;
@java_import@
import java.io.IOException;
@java_util_import@
import org.pytorch.executorch.EValue;
import org.pytorch.executorch.Module;
import org.pytorch.executorch.Tensor;

/**
 * The student on ExecuTorch.
 *
 * <p>build.gradle.kts: minSdk = 23 and implementation("org.pytorch:executorch-android:@executorch_version@"), the version that
 * wrote the file: a runtime of another version may refuse it. The file itself goes to app/src/main/assets.
 *
 * <p>Make one of these and keep it, and call it from a background thread: loading and running take time. ExecuTorch
 * runs one call of a module at a time; others wait, but close() throws while one runs.
 *
 * <p>@note@
 */
public final class JavaExample implements AutoCloseable {
    private final Module module;

    public JavaExample(Context context) throws IOException {
        String path = AssetFile.path(context, StudentInfo.@executorch@_FILE, StudentInfo.@executorch@_SHA256);
        module = Module.load(path);
    }

    /** @returns@ */
    public @java_type@ @method@(@java_argument@) {
@java_input@
        Tensor tensor = Tensor.fromBlob(input, StudentInfo.INPUT_SHAPE);
        float[] output = module.forward(EValue.from(tensor))[0].toTensor().getDataAsFloatArray();
        return @result@;
    }

    @Override
    public void close() {
        module.destroy();
    }
}
