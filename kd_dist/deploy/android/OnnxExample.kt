package dev.kd_dist.student

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtSession
import android.content.Context
@kotlin_import@
import java.nio.FloatBuffer

/**
 * The student on ONNX Runtime.
 *
 * build.gradle.kts: minSdk = 24 and implementation("com.microsoft.onnxruntime:onnxruntime-android:@onnxruntime_version@"), the
 * version that the file was tried with; a later one reads it too, and so may an earlier one: not each is published for
 * Android. The file itself goes to app/src/main/assets.
 *
 * Make one of these and keep it, and call it from background threads (withContext(Dispatchers.Default)): loading and
 * running take time. Several threads may use one session at once; close it when none does.
 *
 * @note@
 */
class OnnxExample(context: Context) : AutoCloseable {
    private val environment = OrtEnvironment.getEnvironment()
    private val session: OrtSession =
        environment.createSession(context.assets.open(StudentInfo.@onnx@_FILE).use { it.readBytes() })

    /** @returns@ */
    fun @method@(@kotlin_argument@): @kotlin_type@ {
@kotlin_input@
        val output = FloatArray(StudentInfo.OUTPUT_SIZE)
        OnnxTensor.createTensor(environment, FloatBuffer.wrap(input), StudentInfo.INPUT_SHAPE).use { tensor ->
            session.run(mapOf(StudentInfo.INPUT_NAME to tensor)).use { outputs ->
                (outputs[0] as OnnxTensor).floatBuffer.get(output)
            }
        }
        return @result@
    }

    override fun close() = session.close()
}
