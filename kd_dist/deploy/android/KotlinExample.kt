package dev.kd_dist.student

import android.content.Context
@kotlin_import@
import org.pytorch.executorch.EValue
import org.pytorch.executorch.Module
import org.pytorch.executorch.Tensor

/**
 * The student on ExecuTorch.
 *
 * build.gradle.kts: minSdk = 23 and implementation("org.pytorch:executorch-android:@executorch_version@"), the version that
 * wrote the file: a runtime of another version may refuse it. The file itself goes to app/src/main/assets.
 *
 * Make one of these and keep it, and call it from a background thread (withContext(Dispatchers.Default)): loading and
 * running take time. ExecuTorch runs one call of a module at a time; others wait, but close() throws while one runs.
 *
 * @note@
 */
class KotlinExample(context: Context) : AutoCloseable {
    private val module =
        Module.load(AssetFile.path(context, StudentInfo.@executorch@_FILE, StudentInfo.@executorch@_SHA256))

    /** @returns@ */
    fun @method@(@kotlin_argument@): @kotlin_type@ {
@kotlin_input@
        val tensor = Tensor.fromBlob(input, StudentInfo.INPUT_SHAPE)
        val output = module.forward(EValue.from(tensor))[0].toTensor().dataAsFloatArray
        return @result@
    }

    override fun close() = module.destroy()
}
